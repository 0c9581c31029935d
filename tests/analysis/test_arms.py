"""Arms are told apart, named and checked."""

from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.arms import arm_label, check_runs, each_arm, rows_of, with_losses
from lorabench.errors import UserError

from ..handmade.sft import arm, tables


def test_labels_name_rank_and_only_unusual_placements():
    labels = [
        arm_label({"method": "fullft", "rank": pd.NA, "placement": None}),
        arm_label({"method": "lora", "rank": 8, "placement": "all"}),
        arm_label({"method": "lora", "rank": 8.0, "placement": "attn"}),
    ]
    assert labels == ["FullFT", "LoRA r8", "LoRA r8 attn"]


def test_arms_come_fullft_first_then_by_rank_and_nulls_do_not_drop_any():
    runs, _ = tables([arm(16, optimum=3e-3), arm(2, optimum=3e-3), arm(optimum=3e-4)])
    arms = each_arm(runs)
    assert [arm_label(key) for key, _ in arms] == ["FullFT", "LoRA r2", "LoRA r16"]
    assert sum(len(rows) for _, rows in arms) == len(runs)
    for key, rows in arms:
        assert list(rows_of(runs, key)["run_id"]) == list(rows["run_id"])


def test_runs_that_nothing_tells_apart_are_refused():
    runs, _ = tables([arm(8, optimum=3e-3)])
    decayed = runs.assign(weight_decay=0.1, run_id=runs["run_id"] + "-decayed")
    with pytest.raises(UserError, match="same LR and seed"):
        check_runs(pd.concat([runs, decayed]))
    runs.loc[1, "run_id"] = runs.loc[0, "run_id"]
    with pytest.raises(UserError, match="more than once: tiny-instruct-lora-8"):
        check_runs(runs)


@given(changed=st.sampled_from([{"steps": 256}, {"alpha": 8.0}, {"init_a": 2.0}, {"lr_ratio": 4.0}, {"eps": 0.0}]))
def test_length_and_parametrization_make_an_arm(changed):
    runs, _ = tables([arm(8, optimum=3e-3, alpha=32.0, init_a=1.0, lr_ratio=1.0, eps=1e-8)])
    other = runs.assign(**changed, run_id=runs["run_id"] + "-other")
    assert len(each_arm(pd.concat([runs, other]))) == 2
    check_runs(pd.concat([runs, other]))


def test_losses_are_the_final_nlls_unless_runs_have_their_own():
    runs, _ = tables([arm(optimum=3e-4)])
    assert with_losses(runs)["validation_loss"].equals(runs["final_valid_nll"])
    assert with_losses(runs)["test_loss"].equals(runs["final_test_nll"])
    own = runs.assign(validation_loss=0.25, test_loss=0.5)
    pd.testing.assert_frame_equal(with_losses(own), own)
