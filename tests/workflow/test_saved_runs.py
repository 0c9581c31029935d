"""A preset that was run in part goes on in a fresh clone from the runs that the repository keeps."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest
import yaml

from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from .checkout import fresh_clone, git, shell, snakemake
from .test_workflow import planned_jobs

TABLES = "results/mine/tables/runs.parquet"


@pytest.mark.slow
def test_a_fresh_clone_trains_only_what_is_missing_and_gets_the_same_numbers(raw_preset, tmp_path, monkeypatch):
    clone = fresh_clone(tmp_path / "clone")
    raw_preset["datasets"]["instruct"]["train"] = 32
    # One job per sweep.
    (clone / "mine.yaml").write_text(yaml.safe_dump(raw_preset | {"execution": {"gflops": 0.01}}))
    monkeypatch.chdir(clone)
    plan, layout = make_plan(Layout.of("mine.yaml").preset), Layout.of("mine.yaml")
    _, second, third = plan.jobs
    snakemake(clone, TABLES, "--config", "preset=mine.yaml")
    whole = pd.read_parquet(clone / TABLES)

    # What an interruption leaves: one finished job, one with 2 of 4 runs, one that was never started.
    for job in (second, third):
        layout.job(job).unlink()
    for run_id in sorted(third.sweeps[0].run_ids) + sorted(run.run_id for run in second.sweeps[0].possible_runs())[2:]:
        shutil.rmtree(layout.runs / run_id, ignore_errors=True)
    left = {path.name for path in layout.runs.iterdir()}
    assert f"saved {len(left)} runs in paper_figures/partial/mine" in shell(
        "python workflow/scripts/saved_runs.py save --preset mine.yaml", clone
    )
    git(clone, "add", "-A")
    git(clone, "commit", "-qm", "partial results")

    fresh = tmp_path / "fresh"
    git(tmp_path, "clone", "-q", str(clone), str(fresh))
    assert not (fresh / "results/mine").exists()
    monkeypatch.chdir(fresh)
    output = shell("python workflow/scripts/saved_runs.py restore --preset mine.yaml", fresh)
    assert f"restored {len(left)} runs from paper_figures/partial/mine; 0 were there already" in output
    planned = planned_jobs(snakemake(fresh, TABLES, "--dry-run", "--quiet", "rules", "--config", "preset=mine.yaml"))
    assert planned == {"dataset": 1, "tokens": 1, "train": 3, "tables": 1}
    output = snakemake(fresh, TABLES, "--config", "preset=mine.yaml")
    restored = pd.read_parquet(fresh / TABLES)
    numbers = ["run_id", "lr", "seed", "final_valid_nll", "final_test_nll"]
    pd.testing.assert_frame_equal(
        *(table[numbers].sort_values("run_id", ignore_index=True) for table in (restored, whole)), check_exact=True
    )
    started = dict(zip(restored["run_id"], restored["started"], strict=True))
    before = dict(zip(whole["run_id"], whole["started"], strict=True))
    assert {run_id for run_id in started if started[run_id] == before[run_id]} == left
