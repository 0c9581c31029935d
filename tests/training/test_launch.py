"""`lorabench step train --processes 2`, as the workflow calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel

from lorabench.config.inputs import PathModel
from lorabench.models.base import load_model
from lorabench.runs import Job

from .conftest import TINY, trained

pytestmark = pytest.mark.slow

KEPT = ["run_id", "lr", "seed", "status", "train_tokens", "train_flops", "trainable_params", "base_params"]
LOSSES = ["final_valid_nll", "final_test_nll"]


def command(sweep, processes: int = 2) -> list[str]:
    words = [
        "-m",
        "lorabench.cli",
        "step",
        "train",
        sweep.sweep_id,
        "--preset",
        "mine.yaml",
        "--processes",
        str(processes),
    ]
    return [sys.executable, *words]


def sweep_of(plan, method: str):
    return next(sweep for sweep in plan.sweeps if sweep.condition.method == method)


def together(plan, layout, method: str):
    """Train the sweep of one method in two processes; return its rows and the text on stderr."""
    sweep = sweep_of(plan, method)
    done = subprocess.run(command(sweep), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return pq.read_table(layout.job(Job((sweep,)))).to_pandas(), done.stderr


def assert_same(runs, others) -> None:
    assert runs[KEPT].equals(others[KEPT])
    for column in LOSSES:
        assert list(runs[column]) == pytest.approx(list(others[column]), rel=1e-5)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two weights are equal in norm; Adam may move entries with a gradient near zero either way."""
    return bool((one - other).norm() <= 1e-3 * other.norm())


def compare(ready, method: str, **lrs):
    """Train in one process and in two and compare their numbers; the runs of one process are kept in `alone`."""
    plan, layout = ready("sweep", {"keep_weights": "all"}, **lrs)
    alone, _ = trained(plan, layout, method)
    layout.runs.rename("alone")
    layout.job(Job((sweep_of(plan, method),))).unlink()
    runs, said = together(plan, layout, method)
    assert_same(runs, alone)
    assert said.count("run 1/") == 2, "only the first process says when a run starts and ends"
    assert not layout.progress(sweep_of(plan, method)).exists()
    record = json.loads((layout.runs / runs.run_id[0] / "record.json").read_text())
    assert record["environment"]["processes"] == 2
    return runs, layout


def test_full_fine_tuning_in_two_processes_leaves_an_ordinary_model(ready):
    runs, layout = compare(ready, "fullft")
    for run_id in runs.run_id:
        folders = layout.runs / run_id / "weights", Path("alone") / run_id / "weights"
        assert sorted(p.name for p in folders[0].iterdir()) == sorted(p.name for p in folders[1].iterdir())
        configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
        assert configs[0] == configs[1]
        models = [load_model(PathModel(kind="path", path=str(f), parameters=1, hidden_size=1)) for f in folders]
        for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
            assert close(one, other), name


def test_lora_in_two_processes_leaves_an_ordinary_adapter(ready):
    runs, layout = compare(ready, "lora", lora=[1e-3, 3e-3])
    assert len(runs) == 3
    base = load_model(TINY)
    for run_id in runs.run_id:
        folders = layout.runs / run_id / "weights", Path("alone") / run_id / "weights"
        assert sorted(p.name for p in folders[0].iterdir()) == sorted(p.name for p in folders[1].iterdir())
        states = []
        for folder in folders:
            model = PeftModel.from_pretrained(base, folder)
            states.append({name: p.clone() for name, p in model.named_parameters() if ".lora_" in name})
            base = model.unload()
        assert any(p.abs().max() > 0 for name, p in states[0].items() if ".lora_B." in name)
        assert all(close(one, states[1][name]) for name, one in states[0].items())


def test_an_error_ends_all_processes_and_is_shown_once(ready):
    plan, layout = ready("broken")
    # Both processes find the error when they read the tokens.
    layout.dataset("instruct").write_bytes(layout.dataset("instruct").read_bytes() + b" ")
    done = subprocess.run(command(sweep_of(plan, "lora")), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("lorabench:")]
    assert len(errors) == 1
    assert "token cache" in errors[0]
    assert "Traceback" not in done.stderr


def test_killed_processes_go_on_where_they_were(ready):
    plan, layout = ready("killed", {"checkpoint_minutes": 0.0, "keep_weights": "all"}, lora=[1e-3, 3e-3])
    sweep = sweep_of(plan, "lora")
    first, second = (layout.runs / run.run_id for run in sweep.grid())
    checkpoint = second.with_name(f"{second.name}.partial") / "checkpoint.safetensors"
    process = subprocess.Popen(command(sweep), stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert (first / "record.json").exists()
    assert not second.exists()
    kept = (first / "record.json").stat().st_mtime_ns

    resumed, _ = together(plan, layout, "lora")
    assert (first / "record.json").stat().st_mtime_ns == kept
    assert not checkpoint.exists()
    layout.job(Job((sweep,))).unlink()
    layout.runs.rename("resumed")
    unbroken, _ = together(plan, layout, "lora")
    assert [list(curve) for curve in resumed.curve] == [list(curve) for curve in unbroken.curve]
    assert resumed[[*KEPT, *LOSSES]].equals(unbroken[[*KEPT, *LOSSES]])


def test_processes_that_get_a_signal_save_together(ready):
    plan, layout = ready("stopped", {"checkpoint_minutes": 1000, "keep_weights": "all"})
    sweep = sweep_of(plan, "lora")
    process = subprocess.Popen(command(sweep), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not layout.progress(sweep).exists():
        assert process.poll() is None, "the sweep ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Slurm signals every process of a job, and may do so again; the launching process passes the signal on as well.
    for _ in range(2):
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    errors = [line for line in said.splitlines() if line.startswith("lorabench:")]
    assert errors == ["lorabench: stopped by SIGTERM; what was done is kept, the same command goes on from there"]
    assert "Traceback" not in said
    assert len(list(layout.runs.glob("*.partial/checkpoint.*1-of-2.safetensors"))) == 1
    assert not layout.lock(sweep).exists()
    _, said = together(plan, layout, "lora")
    assert said.count("goes on after step") == 1


def children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
