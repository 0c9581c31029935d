"""The job of an RL sweep as the workflow runs it: weights and tables; two processes sample and learn as one."""

from __future__ import annotations

import json
import shutil
import subprocess
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
from lorabench.store.collect import collect
from lorabench.store.io import read_table
from lorabench.store.layout import Layout
from lorabench.training.job import run_job
from lorabench.training.rl import trainer as rl_job
from lorabench.training.rl.loop import evaluate

from ..conftest import command
from .conftest import TINY


@pytest.fixture
def job(tmp_path, monkeypatch, raw_rl_preset):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(raw_rl_preset))
    layout = Layout.of("mine.yaml")
    for name, spec in layout.preset.problems.items():
        write_problems(make_problems(spec), layout.dataset(name))
    plan = make_plan(layout.preset)
    return plan, layout, {sweep.condition.method: sweep for sweep in plan.sweeps}


def base_reward(record: str) -> float:
    return json.loads(record)["outcome"]["base_reward"]


@pytest.mark.slow
def test_a_job_gives_rows_curves_and_weights_and_goes_on_where_it_was(job, monkeypatch):
    plan, layout, sweeps = job
    whole, lines, evaluations = Job(tuple(sweeps.values())), [], []
    monkeypatch.setattr(rl_job, "evaluate", lambda *given: evaluations.append(given) or evaluate(*given))
    run_job(plan, whole, layout, lines.append)
    assert len(evaluations) == 1, "the sweeps of a job share the scores of the base"
    collect([layout.job(whole)], layout.tables())
    runs, curves = read_table(layout.tables(), "runs"), read_table(layout.tables(), "curves")
    assert len(runs) == 2 + 4
    assert set(runs["task"]) == {"rl"}
    assert set(runs["group_size"]) == {4}
    assert set(runs["batch_size"]) == {16}
    rewards = runs[["base_reward", "final_valid_reward", "final_reward", "best_reward"]]
    assert rewards.notna().all(axis=None)
    assert rewards["base_reward"].nunique() == 1
    assert runs[["constant_reward", "rule_reward"]].drop_duplicates().notna().values.tolist() == [[True, True]]
    assert (runs["final_entropy"] > 0).all()
    assert runs["final_truncated"].between(0, 1).all()
    assert (runs["final_test_nll"].isna()).all()
    assert set(curves["split"]) == {"train", "validation", "test", "gcd-of-three"}
    lora = runs[runs["method"] == "lora"]
    assert lora["trainable_params"].nunique() == 1
    assert lora["train_flops"].div(lora["train_tokens"]).nunique() == 1
    assert any("accuracy" in line for line in lines)

    at_best = lora[lora["seed"] == 1]["lr"].item()
    kept = {run_id for run_id in lora["run_id"] if (layout.runs / run_id / "weights").exists()}
    assert kept == set(lora.loc[lora["lr"] == at_best, "run_id"])
    for run_id in kept:
        weights = layout.runs / run_id / "weights"
        model = PeftModel.from_pretrained(load_model(TINY), weights)
        trained = {name for name, p in model.named_parameters() if ".lora_B." in name and p.abs().max() > 0}
        assert trained

    first = pq.read_table(layout.job(whole)).to_pandas()
    layout.job(whole).unlink()
    lost = layout.runs / lora["run_id"].iloc[0]
    record = (lost / "record.json").read_text()
    shutil.rmtree(lost)
    run_job(plan, whole, layout, lambda line: None)
    assert base_reward((lost / "record.json").read_text()) == base_reward(record)

    layout.job(whole).unlink()
    monkeypatch.setattr(rl_job, "train_rl", None)
    run_job(plan, whole, layout, lambda line: None)
    assert list(pq.read_table(layout.job(whole)).to_pandas()["run_id"]) == list(first["run_id"])


SAMPLED = ("reward", "equal_groups", "response_length", "truncated", "accuracy", "n_samples")


def make(folder: Path, raw: dict, precision: str) -> None:
    """Write a preset and its problems."""
    raw["experiments"]["rl_arithmetic"][0] |= {"lrs": {"fullft": [1e-4], "lora": [1e-3, 3e-3]}, "seeds": 1}
    changed = deepcopy(raw) | {"protocol": {"precision": precision}}
    changed["execution"] |= {"keep_weights": "all", "checkpoint_minutes": 0.0}
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
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_sample_and_learn_as_one(precision, tmp_path, raw_rl_preset, monkeypatch):
    alone, several = tmp_path / "alone", tmp_path / "several"
    for folder in (alone, several):
        make(folder, raw_rl_preset, precision)
    monkeypatch.chdir(alone)
    layout = Layout.of("mine.yaml")
    plan = make_plan(layout.preset)
    for sweep in plan.sweeps:
        run_job(plan, Job((sweep,)), layout, lambda line: None)
        together = command(sweep, "--processes", "2")
        done = subprocess.run(together, cwd=several, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    expected, runs = runs_of(alone), runs_of(several)
    assert len(expected) == 3
    assert runs.keys() == expected.keys()
    for run_id, run in runs.items():
        same_run(run, expected[run_id], precision == "bf16")
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
