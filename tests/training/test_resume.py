"""A broken run goes on from its checkpoint and ends with the numbers of an unbroken one, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from lorabench.layout import Layout
from lorabench.plan import make_plan
from lorabench.tables import read_table

from .conftest import condition_of, train


class BrokenError(Exception):
    pass


@pytest.mark.parametrize(("method", "rank"), [("fullft", None), ("lora", 4)])
def test_resumed_equals_unbroken(method, rank, data, tmp_path):
    condition = condition_of(method, rank, steps=16, batch_size=4)
    whole, model = train(condition, data, tmp_path / "whole", lr=3e-3)

    def break_at_nine(step):
        if step == 9:
            raise BrokenError

    with pytest.raises(BrokenError):
        train(condition, data, tmp_path / "broken", lr=3e-3, checkpoint_seconds=0, tick=break_at_nine)
    resumed_steps = []
    resumed, resumed_model = train(condition, data, tmp_path / "broken", lr=3e-3, tick=resumed_steps.append)
    assert resumed_steps == list(range(9, 17))
    assert resumed.curve == whole.curve
    assert (resumed.final_test_nll, resumed.train_tokens) == (whole.final_test_nll, whole.train_tokens)
    for (name, a), (_, b) in zip(model.named_parameters(), resumed_model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def lorabench(*arguments, **options):
    command = [sys.executable, "-m", "lorabench.cli", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


@pytest.fixture
def preset(tmp_path, raw_preset, monkeypatch):
    """A preset whose data are made, in a working directory of its own."""
    raw_preset["experiments"]["rank"]["ranks"] = [4]
    raw_preset["execution"] |= {"checkpoint_minutes": 0.0, "keep_weights": "all"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw_preset))
    monkeypatch.chdir(tmp_path)
    lorabench("dataset", "instruct", "--preset", "mine.yaml")
    lorabench("tokens", "tiny", "instruct", "--preset", "mine.yaml")
    return Layout.of("mine.yaml")


def numbers(layout: Layout, sweep) -> tuple:
    lorabench("collect", str(layout.sweep(sweep)), "--out", "tables")
    runs, curves = read_table(Path("tables"), "runs"), read_table(Path("tables"), "curves")
    kept = ["run_id", "lr", "seed", "status", "final_valid_nll", "final_test_nll", "train_tokens", "train_flops"]
    return runs[kept].to_dict("list"), curves.to_dict("list")


def test_a_sweep_killed_in_the_middle_of_a_run_ends_as_an_unbroken_one(preset):
    sweep = next(s for s in make_plan(preset.preset).sweeps if s.condition.method == "lora")
    run = ("sweep", sweep.sweep_id, "--preset", "mine.yaml")
    lorabench(*run)
    unbroken = numbers(preset, sweep)
    first, second = (preset.runs / r.run_id for r in sweep.grid()[:2])
    preset.sweep(sweep).unlink()
    preset.runs.rename("unbroken")

    process = subprocess.Popen([sys.executable, "-m", "lorabench.cli", *run], stderr=subprocess.PIPE)
    checkpoint = second.with_name(f"{second.name}.partial") / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # The run in progress has a checkpoint and is not taken for a result; the finished one is kept.
    assert (first / "record.json").exists()
    assert not second.exists()
    assert not preset.sweep(sweep).exists()
    kept = (first / "record.json").stat().st_mtime_ns

    lorabench(*run)
    assert (first / "record.json").stat().st_mtime_ns == kept
    assert not checkpoint.exists()
    assert numbers(preset, sweep) == unbroken
    for record in sorted(preset.runs.glob("*/record.json")):
        adapter = "weights/adapter_model.safetensors"
        assert (record.parent / adapter).read_bytes() == (Path("unbroken") / record.parent.name / adapter).read_bytes()


def test_a_half_written_run_is_no_result(preset):
    sweep = next(s for s in make_plan(preset.preset).sweeps if s.condition.method == "lora")
    run = sweep.grid()[0]
    staging = preset.runs / f"{run.run_id}.finishing"
    staging.mkdir(parents=True)
    (staging / "record.json").write_text(json.dumps({"outcome": {"final_test_nll": 0.0}}))
    lorabench("sweep", sweep.sweep_id, "--preset", "mine.yaml")
    assert not staging.exists()
    record = json.loads((preset.runs / run.run_id / "record.json").read_text())
    assert record["outcome"]["final_test_nll"] > 0
