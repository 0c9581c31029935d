"""The waves of a sweep whose runs are jobs of their own, as the rule `wave` lists them one after the other."""

import math
import shutil
from pathlib import Path

import pytest
import yaml

from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.runs import Run, best_lr, finished_losses
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.waves import next_wave

from ..handmade import make_record


@pytest.fixture
def sweep_layout(raw_preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw_preset["experiments"]["rank"][0] |= {"lrs": {"lora": {"start": 1e-3}, "fullft": []}, "ranks": {"all": [4]}}
    Path("mine.yaml").write_text(yaml.safe_dump(raw_preset))
    layout = Layout.of("mine.yaml")
    plan = make_plan(layout.preset)
    [sweep] = plan.sweeps
    return plan, sweep, layout


def loss(run: Run) -> float:
    """The loss of a run; the best LR, 1e-2, is not one of the first three."""
    return math.log(run.lr / 9e-3) ** 2 + 1e-3 * run.seed


def finish(run: Run, layout: Layout) -> None:
    with RunFolder(layout.runs, run.run_id).finishing(make_record(run, final_valid_nll=loss(run))) as staging:
        (staging / "weights").mkdir()


def test_a_wave_follows_finished_runs_only(sweep_layout):
    plan, sweep, layout = sweep_layout
    first, *others = sweep.grid()
    for run in others:
        finish(run, layout)
    with pytest.raises(UserError, match=f"run {first.run_id} is not finished"):
        next_wave(plan, sweep, layout, 2)


def test_the_waves_have_the_runs_of_one_job_in_its_order_and_the_best_one_is_trained_again(sweep_layout):
    plan, sweep, layout = sweep_layout
    listed, wave = [], sweep.grid()
    while wave:
        listed.append(wave)
        for run in reversed(wave):
            finish(run, layout)
        wave = next_wave(plan, sweep, layout, len(listed) + 1)
    losses = finished_losses(sweep, loss)
    assert [run for wave in listed for run in wave] == [Run(sweep.condition, lr, seed) for lr, seed in losses]
    assert len(listed) > 3
    # Its weights are gone.
    best = Run(sweep.condition, best_lr(sweep, losses), 0)
    folder = RunFolder(layout.runs, best.run_id)
    shutil.rmtree(folder.weights)
    assert next_wave(plan, sweep, layout, len(listed) + 1) == [best]
    assert not folder.done()
    finish(best, layout)
    assert next_wave(plan, sweep, layout, len(listed) + 2) == []
