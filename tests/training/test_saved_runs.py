"""Finished runs that are saved in the repository: a clone goes on from them, or refuses them."""

from __future__ import annotations

import shutil

import pytest

import saved_runs
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store.progress import finished_runs
from lorabench.store.run_folder import RunFolder
from lorabench.training import sft
from saved_runs import restore_runs, save_runs

from .conftest import BrokenError, sweep_of, trained


def test_an_unfinished_sweep_is_restored_and_runs_of_another_version_or_settings_are_refused(ready, monkeypatch):
    plan, layout = ready("part", lora=[1e-3, 3e-3])
    train_sft, started = sft.train_sft, []

    def second_breaks(run, *rest):
        started.append(run)
        if len(started) == 2:
            raise BrokenError
        return train_sft(run, *rest)

    monkeypatch.setattr(sft, "train_sft", second_breaks)
    with pytest.raises(BrokenError):
        trained(plan, layout, "lora")
    monkeypatch.setattr(sft, "train_sft", train_sft)
    assert save_runs(plan, layout)[0] == 1
    folder = RunFolder(layout.runs, started[0].run_id)
    outcome = folder.read_record()["outcome"]
    shutil.rmtree(layout.runs)
    # To save again, where no run is left, keeps what was saved.
    assert save_runs(plan, layout)[0] == 1
    protocol = plan.preset.protocol.model_copy(update={"clip_norm": 0.5})
    other = make_plan(plan.preset.model_copy(update={"protocol": protocol}))
    with pytest.raises(UserError, match="none of the 1 runs in .* is in the plan of preset mine: its models"):
        restore_runs(other, layout)
    with monkeypatch.context() as patch:
        patch.setattr(saved_runs, "PROTOCOL_VERSION", 99)
        with pytest.raises(UserError, match=r"holds runs of protocol version \d+, but this code computes version 99"):
            restore_runs(plan, layout)
    assert not layout.runs.exists()
    assert restore_runs(plan, layout) == (1, 0, 0)
    assert restore_runs(plan, layout) == (0, 1, 0)
    assert folder.read_record()["outcome"] == outcome
    assert finished_runs(plan, layout)[0] == 1
    assert started[0] in sweep_of(plan, "lora").grid()
