"""RL in two processes draws the samples of one process and learns the same policy from them."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from peft import PeftModel

from lorabench.data.problems import make_problems, write_problems
from lorabench.models.base import load_model
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.training.job import run_job

from ...conftest import REPOSITORY
from .conftest import TINY

# Sharding and precision of each case.
HELD = {"fsdp": ("fsdp", "fp32"), "ddp": ("ddp", "fp32"), "bf16": ("fsdp", "bf16")}
SAMPLED = ("reward", "equal_groups", "response_length", "truncated", "accuracy", "n_samples")


def make(folder: Path, raw: dict, sharding: str, precision: str) -> None:
    """Write a preset and its problems."""
    raw["experiments"]["rl_arithmetic"][0] |= {"lrs": {"fullft": [1e-4], "lora": [1e-3, 3e-3]}, "seeds": 1}
    changed = deepcopy(raw) | {"protocol": {"precision": precision}}
    changed["execution"] |= {"sharding": sharding, "keep_weights": "all", "checkpoint_minutes": 0.0}
    folder.mkdir()
    (folder / "mine.yaml").write_text(yaml.safe_dump(changed))
    layout = Layout.of(str(folder / "mine.yaml"))
    for problems, spec in layout.preset.problems.items():
        write_problems(make_problems(spec), folder / layout.dataset(problems))


def runs_of(folder: Path) -> dict[str, dict]:
    """Return the rows of the preset's runs by run_id."""
    layout = Layout.of(str(folder / "mine.yaml"))
    files = [folder / layout.job(Job((sweep,))) for sweep in make_plan(layout.preset).sweeps]
    return {row["run_id"]: row for file in files for row in pq.read_table(file).to_pylist()}


@pytest.mark.slow
@pytest.mark.parametrize("held", HELD)
def test_two_processes_sample_and_learn_as_one(held, tmp_path, raw_rl_preset, monkeypatch):
    alone, several = tmp_path / "alone", tmp_path / "several"
    for folder in (alone, several):
        make(folder, raw_rl_preset, *HELD[held])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.training.rl.several", str(several)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(alone)
    layout = Layout.of("mine.yaml")
    plan = make_plan(layout.preset)
    for sweep in plan.sweeps:
        run_job(plan, Job((sweep,)), layout, lambda line: None)
    expected, runs = runs_of(alone), runs_of(several)
    assert len(expected) == 3
    assert runs.keys() == expected.keys()
    for run_id, run in runs.items():
        same_run(run, expected[run_id], held == "bf16")
        weights = several / layout.runs / run_id / "weights"
        if run["method"] == "lora":
            adapted = PeftModel.from_pretrained(load_model(TINY), weights)
            assert any(p.abs().max() > 0 for n, p in adapted.named_parameters() if ".lora_B." in n)
        else:
            assert (weights / "model.safetensors").is_file()


def same_run(run: dict, expected: dict, rounded: bool) -> None:
    curves = [
        {(point["step"], point["split"], point["metric"]): point["value"] for point in row["curve"]}
        for row in (run, expected)
    ]
    assert curves[0].keys() == curves[1].keys()
    for (step, split, metric), value in curves[1].items():
        ours = curves[0][step, split, metric]
        # The copy that samples must have the policy of the model that learns.
        if metric == "kl":
            assert abs(ours) < (1e-2 if rounded else 1e-5), step
        elif metric in ("ratio_mean", "ratio_max"):
            assert ours == pytest.approx(1, abs=0.1 if rounded else 1e-4), (step, metric)
        elif metric == "ratio_above_2":
            assert ours == 0, step
        elif metric in SAMPLED and not (rounded and step > 1):
            # In bf16 each part of a batch is rounded separately, so that later policies differ slightly.
            assert ours == value, (step, split, metric)
        elif metric in ("grad_norm", "entropy") and not rounded:
            assert ours == pytest.approx(value, rel=1e-4), (step, metric)
    assert run["train_tokens"] == expected["train_tokens"] or rounded
