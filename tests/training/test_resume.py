"""An interrupted run goes on from its checkpoint and ends with the numbers of an uninterrupted one, to the last bit."""

from __future__ import annotations

import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import TinyModel
from lorabench.training.loss import scored_by_example

from .conftest import BrokenError, breaking_at, condition_of, needs_gpu, train


@pytest.mark.parametrize(
    ("method", "rank", "device"),
    [
        ("fullft", None, "cpu"),
        ("pissa", 4, "cpu"),
        pytest.param("fullft", None, "cuda", marks=needs_gpu),
        pytest.param("lora", 4, "cuda", marks=needs_gpu),
    ],
)
def test_resumed_equals_unbroken(method, rank, device, data, tmp_path):
    """The 5 steps of 8 are an epoch, so the description length is among the numbers."""
    condition = condition_of(method, rank, steps=5, batch_size=8)
    options = {"lr": 3e-3, "spec": TinyModel(kind="tiny", name="llama-64"), "device": torch.device(device)}
    if device == "cuda":
        options["protocol"] = Protocol(precision="bf16")
    whole, model = train(condition, data, tmp_path / "whole", **options)
    with pytest.raises(BrokenError):
        train(condition, data, tmp_path / "broken", checkpoint_seconds=0, tick=breaking_at(4), **options)
    resumed_steps = []
    resumed, resumed_model = train(condition, data, tmp_path / "broken", tick=resumed_steps.append, **options)
    assert resumed_steps == [4, 5]
    assert {**vars(resumed), "wall_s": 0} == {**vars(whole), "wall_s": 0}
    assert whole.first_epoch_nats > 0
    assert whole.first_epoch_scored_tokens == scored_by_example(data["train"]).sum()
    for (name, a), (_, b) in zip(model.named_parameters(), resumed_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
