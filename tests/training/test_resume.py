"""An interrupted run goes on from its checkpoint and ends with the numbers of an uninterrupted one, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import TinyModel
from lorabench.runs import Job, Run
from lorabench.store.progress import finished_runs
from lorabench.training.loss import scored_by_example

from ..forks import start_forked
from .conftest import BrokenError, condition_of, needs_gpu, sweep_of, train, trained, wait_for


@pytest.mark.parametrize(
    ("method", "rank", "device"),
    [
        ("fullft", None, "cpu"),
        ("lora", 4, "cpu"),
        ("pissa", 4, "cpu"),
        pytest.param("fullft", None, "cuda", marks=needs_gpu),
        pytest.param("lora", 4, "cuda", marks=needs_gpu),
    ],
)
def test_resumed_equals_unbroken(method, rank, device, data, tmp_path):
    """The 10 steps of 8 are an epoch, so the description length is among the numbers."""
    condition = condition_of(method, rank, steps=10, batch_size=8)
    options = {"lr": 3e-3, "spec": TinyModel(kind="tiny", name="llama-64"), "device": torch.device(device)}
    if device == "cuda":
        options["protocol"] = Protocol(precision="bf16")
    whole, model = train(condition, data, tmp_path / "whole", **options)

    def break_at_five(step):
        if step == 5:
            raise BrokenError

    with pytest.raises(BrokenError):
        train(condition, data, tmp_path / "broken", checkpoint_seconds=0, tick=break_at_five, **options)
    resumed_steps = []
    resumed, resumed_model = train(condition, data, tmp_path / "broken", tick=resumed_steps.append, **options)
    assert resumed_steps == list(range(5, 11))
    assert {**vars(resumed), "wall_s": 0} == {**vars(whole), "wall_s": 0}
    assert whole.first_epoch_nats > 0
    assert whole.first_epoch_scored_tokens == scored_by_example(data["train"]).sum()
    for (name, a), (_, b) in zip(model.named_parameters(), resumed_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def numbers(runs) -> list[dict]:
    """Return the columns that must not depend on interruptions."""
    kept = ["run_id", "lr", "seed", "status", "final_valid_nll", "final_test_nll", "train_tokens", "train_flops"]
    kept += ["trainable_params", "base_params"]
    return [row | {"curve": list(curve)} for row, curve in zip(runs[kept].to_dict("records"), runs.curve, strict=True)]


@pytest.mark.slow
def test_a_walk_killed_in_the_middle_ends_as_an_unbroken_one(ready):
    plan, layout = ready("walk", {"checkpoint_minutes": 0.0}, lora={"start": 1e-4, "most": 5})
    sweep = sweep_of(plan, "lora")
    # The optimum is far above, so the second wave has one LR.
    fourth = Run(sweep.condition, 4.64e-4, 0)
    checkpoint = layout.runs / f"{fourth.run_id}.partial" / "checkpoint.safetensors"

    fork = start_forked(["lorabench", "step", "train", sweep.sweep_id, "--preset", "mine.yaml"], Path.cwd(), "output")
    wait_for(checkpoint, fork.is_alive)
    fork.kill()
    fork.join()
    resumed, lines = trained(plan, layout, "lora")
    assert "ended at 5 LRs" in lines[-1]

    layout.job(Job((sweep,))).unlink()
    layout.runs.rename("resumed")
    unbroken, _ = trained(plan, layout, "lora")
    assert numbers(resumed) == numbers(unbroken)
    assert unbroken.lr.nunique() == 5
    # Weights are kept at the best LR only.
    assert len(list(layout.runs.glob("*/weights"))) == sweep.seeds.best
    others = sum(s.n_runs for s in plan.sweeps if s != sweep)
    assert finished_runs(plan, layout)[:2] == (len(unbroken), sweep.n_runs + others)


def test_a_half_written_run_is_no_result(ready):
    plan, layout = ready("half")
    sweep = sweep_of(plan, "lora")
    staging = layout.runs / f"{sweep.grid()[0].run_id}.finishing"
    staging.mkdir(parents=True)
    (staging / "record.json").write_text(json.dumps({"outcome": {"final_test_nll": 0.0}}))
    runs, _ = trained(plan, layout, "lora")
    assert not staging.exists()
    assert (runs.final_test_nll > 0).all()
