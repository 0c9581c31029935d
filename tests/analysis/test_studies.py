"""Tests of studies, in which each seed with an LR grid picks its own best LR."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.studies import over_studies, seed_studies

from ..handmade.sft import arm, tables


def studies_of(*optima_and_floors, **columns):
    """Return an LR grid per seed, from pairs of optimal LR and lowest loss."""
    parts = []
    for seed, (optimum, floor) in enumerate(optima_and_floors):
        runs, _ = tables([arm(8, optimum=optimum, floor=floor, offsets=(0.0,), **columns)])
        parts.append(runs.assign(seed=seed, run_id=runs["run_id"] + f"-study{seed}"))
    return pd.concat(parts, ignore_index=True)


def test_each_seed_picks_its_own_lr():
    runs = studies_of((3e-3, 2.0), (1e-3, 2.1), (3e-3, 2.3))
    studies = seed_studies(runs)
    assert studies["lr_best"].tolist() == [3e-3, 1e-3, 3e-3]
    assert studies["loss"].tolist() == pytest.approx([2.0, 2.1, 2.3])
    assert studies["n_lrs"].tolist() == [6, 6, 6]
    assert not studies["at_edge"].any()
    [row] = over_studies(studies).to_dict("records")
    assert (row["loss_median"], row["loss_min"], row["loss_max"]) == pytest.approx((2.1, 2.0, 2.3))
    assert (row["lr_median"], row["lr_min"], row["lr_max"]) == pytest.approx((3e-3, 1e-3, 3e-3))
    assert row["n_studies"] == 3


def test_repeats_at_one_lr_are_no_study():
    runs, _ = tables([arm(8, optimum=3e-3), arm(optimum=3e-4)])
    studies = seed_studies(runs)
    assert studies["seed"].tolist() == [0, 0]
    assert over_studies(studies)["n_studies"].tolist() == [1, 1]


def test_a_study_at_the_edge_or_without_a_finished_run():
    runs = studies_of((3e-2, 2.0), (3e-3, 2.1))
    lost = runs["seed"] == 1
    runs.loc[lost, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    studies = seed_studies(runs)
    assert studies["at_edge"].tolist() == [True, False]
    assert math.isnan(studies["loss"].iloc[1])
    assert over_studies(studies)["n_studies"].tolist() == [1]


def test_no_grid_at_all():
    runs, _ = tables([arm(8, optimum=1e-3, lrs=(1e-3, 3e-3))])
    assert seed_studies(runs).empty
    assert over_studies(seed_studies(runs)).empty
