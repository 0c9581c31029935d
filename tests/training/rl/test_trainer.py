"""The job of an RL sweep as the workflow runs it: lanes, weights and tables."""

from __future__ import annotations

import json
import shutil
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
    # A lane does not count the adapters of other lanes.
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
    assert len(evaluations) == 1, "another job reads the scores of the base"
    assert base_reward((lost / "record.json").read_text()) == base_reward(record)

    layout.job(whole).unlink()
    monkeypatch.setattr("lorabench.training.rl.trainer.train_lanes", None)
    run_job(plan, whole, layout, lambda line: None)
    assert list(pq.read_table(layout.job(whole)).to_pandas()["run_id"]) == list(first["run_id"])
