from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.analysis.arms import arm_label, check_runs, each_arm, rows_of
from lorabench.analysis.noise import seed_noise
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


def test_sigma_is_pooled_over_cells_with_several_seeds():
    runs, _ = tables(
        [arm(optimum=3e-4, offsets=(0.0, 0.01, -0.01)), arm(8, optimum=3e-3, offsets=(0.0, 0.03)), arm(1, optimum=1e-3)]
    )
    runs.loc[runs["rank"].eq(1) & (runs["seed"] > 0), ["status", "final_test_nll"]] = ["diverged", math.nan]
    noise = seed_noise(runs).iloc[0]
    # Squared deviations 2 x 0.01^2 with 2 degrees of freedom, 2 x 0.015^2 with 1; rank 1 has one finished seed left.
    assert noise["sigma"] == pytest.approx(math.sqrt((2 * 0.01**2 + 2 * 0.015**2) / 3))
    assert (noise["dof"], noise["n_runs"]) == (3, 5)


def test_sigma_is_recovered_from_many_seeds():
    rng = np.random.default_rng(0)
    runs, _ = tables(
        [arm(rank, optimum=3e-3, floor=rank, offsets=rng.normal(0, 0.02, 100)) for rank in (1, 2, 4, 8, 16)]
    )
    assert seed_noise(runs)["sigma"].item() == pytest.approx(0.02, rel=0.1)


def test_no_repeats_no_sigma():
    runs, _ = tables([arm(8, optimum=3e-3, offsets=(0.0,))])
    noise = seed_noise(runs).iloc[0]
    assert math.isnan(noise["sigma"])
    assert noise["dof"] == noise["n_runs"] == 0


def test_noise_is_kept_apart_by_model_and_dataset():
    runs, _ = tables([arm(optimum=1e-3, offsets=(0.0, 0.02)), arm(optimum=1e-3, offsets=(0.0, 0.2), dataset="other")])
    assert seed_noise(runs)["sigma"].tolist() == pytest.approx([0.02 / math.sqrt(2), 0.2 / math.sqrt(2)])


def test_a_run_id_must_not_repeat():
    runs, _ = tables([arm(8, optimum=3e-3)])
    runs.loc[1, "run_id"] = runs.loc[0, "run_id"]
    with pytest.raises(UserError, match="more than once: tiny-instruct-lora-8"):
        check_runs(runs)


@pytest.mark.parametrize("column", ["tokenizer_sha256", "template_sha256"])
def test_tokenizers_must_not_mix_within_a_comparison(column):
    mixed, _ = tables([arm(optimum=3e-4, **{column: "aaa"}), arm(8, optimum=3e-3, **{column: "bbb"})])
    with pytest.raises(UserError, match=r"tiny/instruct have different .*, aaa, bbb"):
        check_runs(mixed)
    apart, _ = tables([arm(optimum=3e-4, **{column: "aaa"}), arm(8, optimum=3e-3, model="other", **{column: "bbb"})])
    check_runs(apart)


def test_runs_that_an_arm_cannot_distinguish_are_refused():
    runs, _ = tables([arm(8, optimum=3e-3)])
    decayed = runs.assign(weight_decay=0.1, run_id=runs["run_id"] + "-decayed")
    with pytest.raises(UserError, match="same LR and seed"):
        seed_noise(pd.concat([runs, decayed]))


@pytest.mark.parametrize("changed", [{"steps": 256}, {"alpha": 8.0}, {"init_a": 2.0}, {"lr_ratio": 4.0}, {"eps": 0.0}])
def test_length_and_parametrization_make_an_arm(changed):
    runs, _ = tables([arm(8, optimum=3e-3, alpha=32.0, init_a=1.0, lr_ratio=1.0, eps=1e-8)])
    other = runs.assign(**changed, run_id=runs["run_id"] + "-other")
    assert len(each_arm(pd.concat([runs, other]))) == 2
    check_runs(pd.concat([runs, other]))
