"""Arms are told apart, named and checked."""

import pandas as pd
import pytest

from lorabench.analysis.arms import arm_label, check_runs, each_arm
from lorabench.errors import UserError
from lorabench.figures.grid import rows_of

from ..handmade.sft import arm, tables


def test_arms_come_fullft_first_then_by_rank_and_nulls_do_not_drop_any():
    runs, _ = tables([arm(16, optimum=3e-3), arm(2, optimum=3e-3), arm(optimum=3e-4)])
    arms = each_arm(runs)
    assert [arm_label(key) for key, _ in arms] == ["FullFT", "LoRA r2", "LoRA r16"]
    assert arm_label({"method": "lora", "rank": 8.0, "placement": "attn"}) == "LoRA r8 attn"
    for key, rows in arms:
        assert list(rows_of(runs, key)["run_id"]) == list(rows["run_id"])


def test_runs_that_nothing_tells_apart_are_refused():
    runs, _ = tables([arm(8, optimum=3e-3)])
    decayed = runs.assign(weight_decay=0.1, run_id=runs["run_id"] + "-decayed")
    with pytest.raises(UserError, match="same LR and seed"):
        check_runs(pd.concat([runs, decayed]))


@pytest.mark.parametrize("changed", [{"steps": 256}, {"alpha": 8.0}, {"init_a": 2.0}, {"lr_ratio": 4.0}, {"eps": 0.0}])
def test_length_and_parametrization_make_an_arm(changed):
    runs, _ = tables([arm(8, optimum=3e-3, alpha=32.0, init_a=1.0, lr_ratio=1.0, eps=1e-8)])
    both = pd.concat([runs, runs.assign(**changed, run_id=runs["run_id"] + "-other")])
    check_runs(both)
    assert len(each_arm(both)) == 2
