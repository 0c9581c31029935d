"""A sweep and its job: diverged runs are results, sweeps share a base; finished runs that were saved go on."""

import shutil

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import saved_runs
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store.progress import finished_runs
from lorabench.store.run_folder import RunFolder
from lorabench.training import context, sft
from saved_runs import restore_runs, save_runs

from .conftest import BrokenError, sweep_of, trained


def test_a_sweep_of_diverged_runs_only_has_no_repeats_and_a_second_call_trains_nothing(ready, monkeypatch):
    plan, layout = ready("lost", lora=[500.0, 1e3])
    runs = trained(plan, layout, sweep_of(plan, "lora"))
    assert list(runs.status) == ["diverged", "diverged"]
    assert (runs.diverged_at > 1).all()
    assert not list(layout.runs.glob("*/weights"))
    monkeypatch.setattr(sft, "train_sft", None)
    assert trained(plan, layout, sweep_of(plan, "lora")).to_json() == runs.to_json()


def test_wrong_weights_stop_the_job_in_its_first_seconds(ready, monkeypatch):
    real = context.load_model

    def scrambled(spec):
        model = real(spec)
        torch.manual_seed(0)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=3.0)
        return model

    monkeypatch.setattr(context, "load_model", scrambled)
    plan, layout = ready("scrambled")
    with pytest.raises(UserError, match="base model tiny has a validation loss of .* worse than guessing"):
        trained(plan, layout, plan.sweeps[0])


@pytest.mark.slow
def test_sweeps_of_a_job_learn_what_each_does_by_itself(ready):
    """Full fine-tuning uses up the base that they share."""
    plan, layout = ready("apart", ranks=[2, 4])
    apart = pd.concat([trained(plan, layout, sweep) for sweep in plan.sweeps], ignore_index=True)
    plan, layout = ready("together", ranks=[2, 4])
    together = trained(plan, layout, *plan.sweeps)
    columns = ["run_id", "lr", "seed", "status", "final_valid_nll", "final_test_nll", "dataset_sha256", "model_sha256"]
    assert_frame_equal(together[columns], apart[columns], check_exact=True)
    assert len(together) == 3 * 2


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
        trained(plan, layout, sweep_of(plan, "lora"))
    monkeypatch.setattr(sft, "train_sft", train_sft)
    assert save_runs(plan, layout)[0] == 1
    folder = RunFolder(layout.runs, started[0].run_id)
    outcome = folder.read_record()["outcome"]
    shutil.rmtree(layout.runs)
    # To save again, where no run is left, keeps what was saved.
    assert save_runs(plan, layout)[0] == 1
    protocol = plan.preset.protocol.model_copy(update={"clip_norm": 0.5})
    other = make_plan(plan.preset.model_copy(update={"protocol": protocol}))
    with pytest.raises(UserError, match="no run in .* is in the plan of preset mine: its models"):
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
