"""Tensor files are safetensors that reveal damage."""

from __future__ import annotations

import time

import numpy as np
import torch
from safetensors.torch import load_file

from lorabench.models.lanes.shelf import single_lane
from lorabench.training.lane_checkpoints import LaneCheckpoints
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
    loaded, (read, about) = load_file(path), read_tensors(path, "pt")
    assert about == {"about": "these"}
    assert loaded.keys() == read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(read[name], tensor), name
    write_tensors(path, {"ids": np.arange(7, dtype=np.int32)}, {})
    assert read_tensors(path, "numpy")[0]["ids"].tolist() == list(range(7))


def state_of(width: int):
    model = torch.nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return single_lane(model, "mine").lanes["mine"], optimizer


def test_checkpoints_that_take_long_are_saved_less_often(tmp_path):
    lane, optimizer = state_of(256)
    checkpoints = LaneCheckpoints({"mine": tmp_path / "checkpoint.safetensors"}, 1e-9)
    assert checkpoints.due(1, last=False)
    started = time.perf_counter()
    checkpoints.save("mine", lane, optimizer, {"step": 1})
    cost = time.perf_counter() - started
    assert not checkpoints.due(2, last=False)
    time.sleep(50 * cost)
    assert checkpoints.due(3, last=False)
