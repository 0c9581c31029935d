"""Tensor files are safetensors that reveal damage."""

from __future__ import annotations

import time

import numpy as np
import torch
from safetensors.torch import load_file

from lorabench.models.passes import trained_parameters
from lorabench.training.checkpoint import Checkpoint
from lorabench.utils.checked_tensors import read_tensors, write_tensors


def test_safetensors_reads_what_was_written(tmp_path):
    path = tmp_path / "some.safetensors"
    numbers = torch.arange(5_000_000, dtype=torch.float32).view(1000, -1)
    tensors = {
        "large": numbers,
        "transposed": numbers.t(),
        "bf16": numbers[:3, :5].bfloat16(),
        "odd bytes": torch.tensor([True, False, True]),
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


def state_of(width: int):
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return trained_parameters(model), optimizer


def test_checkpoints_that_take_long_are_saved_less_often(tmp_path):
    parameters, optimizer = state_of(256)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", "mine", 1e-9)
    assert checkpoint.due()
    started = time.perf_counter()
    checkpoint.save(parameters, optimizer, {"step": 1})
    cost = time.perf_counter() - started
    assert not checkpoint.due()
    time.sleep(50 * cost)
    assert checkpoint.due()
