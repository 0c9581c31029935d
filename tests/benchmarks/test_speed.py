"""The speed benchmark: its tables and the settings of its arms."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from benchmarks.speed import growth, rl, sweep, table
from benchmarks.speed.__main__ import FULL, QUICK
from benchmarks.speed.table import Row
from lorabench.config.loading import load_preset
from lorabench.data.tokens import TokenizedSplit
from lorabench.planning.plan import make_plan
from lorabench.store.tables import Tables
from lorabench.training.loss import IGNORED

from ..conftest import REPOSITORY


def test_ratios_are_per_run_and_to_the_first_of_a_case():
    sweeps = [Row("sweep", "7 LRs", arm, 2, 7, seconds) for arm, seconds in (("ours", 14.0), ("theirs", 70.0))]
    cases = (("tiny", "PEFT", 1, 0.25), ("tiny", "LoRA, 8 lanes", 8, 0.5), ("small", "PEFT", 1, 0.125))
    rows = [*sweeps, *(Row("step", case, arm, 2, lanes, seconds) for case, arm, lanes, seconds in cases)]
    assert [row.ratio for row in table.with_ratios(rows)] == [1, 5, 1, 0.25, 1]


def found(train: float = 1.0, test: float = 2.0) -> dict[float, sweep.Losses]:
    return {1e-3: sweep.Losses(1.0, 2.0), 2e-3: sweep.Losses(train, test)}


def test_losses_must_agree():
    sweep.check_agreement({"a": found(), "b": found(1.0005, 1.9995)}, 1e-3)
    for other, what in ((found(train=1.01), "train"), (found(test=1.99), "test"), (found(test=float("nan")), "test")):
        with pytest.raises(SystemExit, match=f"{what} loss at lr 0.002 is .* by 'a', .* by 'b'"):
            sweep.check_agreement({"a": found(), "b": other}, 1e-3)
    with pytest.raises(SystemExit, match="did not train the same"):
        sweep.check_agreement({"a": found(test=float("nan")), "b": found()}, 1e-3)


@pytest.mark.parametrize("form", [FULL, QUICK])
def test_presets_are_valid_and_of_the_size_they_say(form, tmp_path):
    path, shape = tmp_path / "speed.yaml", form.sweep
    path.write_text(yaml.safe_dump(sweep.preset(shape)))
    loaded = load_preset(str(path))
    [sft] = make_plan(loaded).sweeps
    assert loaded.execution.threads == shape.threads
    assert (sft.n_runs, sft.condition.steps) == (len(shape.lrs), shape.steps)
    assert (sft.condition.batch_size, sft.condition.rank) == (shape.batch_size, shape.rank)
    path.write_text(yaml.safe_dump(rl.preset(form.rl)))
    [rl_sweep] = make_plan(load_preset(str(path))).sweeps
    assert (rl_sweep.n_runs, rl_sweep.condition.batch_size) == (1, form.rl.problems * form.rl.group_size)


def test_rows_for_other_trainers_are_the_tokens_of_the_cache():
    split = TokenizedSplit(np.array([5, 6, 7, 8, 9]), np.array([0, 1, 1, 0, 1], bool), np.array([0, 3, 5]))
    assert sweep.rows(split, [1, 0]) == {"input_ids": [[8, 9], [5, 6, 7]], "labels": [[IGNORED, 9], [IGNORED, 6, 7]]}


@pytest.mark.long
def test_the_quick_form_runs_from_end_to_end(tmp_path):
    out = tmp_path / "speed.csv"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--threads", "1", "--out", str(out)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    measured = pd.read_csv(out)
    assert set(measured.loc[measured["part"] == "sweep", "arm"]) == set(sweep.ARMS.values())
    assert set(measured.loc[measured["part"] == "rl", "arm"]) == set(rl.ARMS.values())
    assert (measured["seconds"] > 0).all()
    losses = measured.loc[measured["part"] == "sweep", "test_nll"]
    assert losses.max() - losses.min() < sweep.TOLERANCE


def test_growth_is_measured_on_made_up_runs_that_can_be_planned_and_judged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    growth.write_preset(100)
    plan = make_plan(load_preset("grow.yaml"))
    assert sum(sweep.n_runs for sweep in plan.sweeps) == 100
    assert len(plan.jobs) < len(plan.sweeps) == 50
    growth.write_tables(200, tmp_path)
    tables = Tables.read(tmp_path)
    assert 200 <= len(tables.runs) == tables.runs["run_id"].nunique() < 400
    assert set(tables.test_losses["run_id"]) == set(tables.runs["run_id"]) == set(tables.curves["run_id"])
    assert tables.runs["dataset"].nunique() == 2
