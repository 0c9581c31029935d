"""Tensor files are safetensors that reveal damage."""

import numpy as np
import torch
from safetensors.torch import load_file

from lorabench.utils.checked_tensors import read_tensors, write_tensors


def test_safetensors_reads_what_was_written(tmp_path):
    path = tmp_path / "some.safetensors"
    numbers = torch.arange(5_000_000, dtype=torch.float32).view(1000, -1)
    tensors = {
        "large": numbers,
        "transposed": numbers.t(),
        "bf16": numbers[:3, :5].bfloat16(),
        "a number": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "trained": torch.ones(3, 2).requires_grad_(),
    }
    write_tensors(path, tensors, {"about": "these"})
    loaded, (read, about) = load_file(path), read_tensors(path)
    assert about == {"about": "these"}
    assert loaded.keys() == read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(read[name], tensor), name
    write_tensors(path, {"ids": np.arange(7, dtype=np.int32)}, {})
    assert read_tensors(path)[0]["ids"].tolist() == list(range(7))
