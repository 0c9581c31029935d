"""Deterministic kernels are asked for on GPUs only, and a model without them is still trained.

The CPU has operations of both kinds too, so the functions are tested here by what they do for a GPU.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.runs import Run
from lorabench.training import determinism
from lorabench.training.run import deterministically

from .conftest import condition_of
from .lanes import base_of, series, train_together

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    monkeypatch.setattr(determinism, "_unavailable", [])


def modes() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_kernels_are_deterministic_within_a_step_on_a_gpu_only():
    # Fused attention's backward pass is deterministic only if the mode is strict.
    assert deterministically(modes, lambda: None, GPU) == (True, False, False)
    assert modes() == (False, False, True)
    assert deterministically(modes, lambda: None, torch.device("cpu")) == (False, False, True)


def test_a_step_without_deterministic_kernels_is_computed_again_without(caplog):
    sums, undone = torch.zeros(2), []

    def compute() -> torch.Tensor:
        sums.add_(1)
        return torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))

    def undo() -> None:
        undone.append(sums.clone())
        sums.zero_()

    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert deterministically(compute, undo, GPU).tolist() == [0, 1, 0]
    [message] = caplog.messages
    assert message == "training on this GPU is not deterministic: put_ has no such kernel"
    assert len(undone) == 1
    assert sums.tolist() == [2, 2], "two steps were computed, and the one that failed was undone"
    assert modes() == (False, False, True)


def test_other_errors_are_not_caught():
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        deterministically(fail, lambda: None, GPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equivalent_runs_are_equal_where_steps_are_deterministic(precision, short_data, tmp_path):
    """Twice A and half the LR of B, in powers of two: the same run, also where weights are rounded to bf16."""
    condition = replace(condition_of("lora", 4, steps=8, batch_size=8), eps=1e-16)
    losses = []
    for init_a, lr, lr_ratio in ((1.0, 2e-3, 1.0), (2.0, 4e-3, 0.25)):
        run = Run(replace(condition, init_a=init_a, lr_ratio=lr_ratio), lr, 0)
        protocol, folder = Protocol(precision=precision, clip_norm=None), Path(tempfile.mkdtemp(dir=tmp_path))
        [outcome] = train_together([run], base_of("llama-64"), short_data, folder, protocol).values()
        losses.append(series(outcome, "nll"))
    assert losses[0] == losses[1]
