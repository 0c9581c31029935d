from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis.comparison import comparisons
from lorabench.analysis.optimal_curves import off_optimum, pair_at_optimum, runs_at_optimum

from ..handmade.sft import CURVATURE, tables
from ..handmade.training import trained

OPTIMUM = 2e-3  # between the LRs 1e-3 and 3e-3


def compared(every_lr: bool, optimum=OPTIMUM):
    """Make a comparison of FullFT and rank 64, whose seeds have each LR or the one with the lowest loss."""
    runs, curves = tables([trained(None, optimum=3e-4), trained(64, optimum=optimum)])
    if every_lr:
        lora = runs[(runs["method"] == "lora") & (runs["seed"] == 0)]
        seeds = [lora.assign(seed=seed, run_id=lora["run_id"] + f"-again{seed}") for seed in (1, 2)]
        again = [
            curves.merge(of_seed[["run_id"]].assign(old=lora["run_id"]), left_on="run_id", right_on="old").assign(
                run_id=lambda table: table["run_id_y"]
            )[curves.columns]
            for of_seed in seeds
        ]
        runs = pd.concat([runs[(runs["method"] == "fullft") | (runs["seed"] == 0)], *seeds], ignore_index=True)
        curves = pd.concat([curves, *again], ignore_index=True)
    [comparison] = comparisons(runs, curves)
    return comparison


def test_curves_are_interpolated_at_the_optimum_where_seeds_have_the_lrs_around_it():
    comparison = compared(every_lr=True)
    lora, fullft = comparison.lora[64], comparison.fullft
    runs = runs_at_optimum(comparison, lora)
    assert sorted(runs["lr"].unique()) == [1e-3, 3e-3, 1e-2]
    assert runs.groupby("seed")["weight"].sum().tolist() == pytest.approx([1.0] * 3)
    paired = pair_at_optimum(comparison, lora, fullft)
    # The loss is a parabola in ln LR, so nothing is lost.
    assert paired.by_seed[0].loc[2:].abs().max() == pytest.approx(0, abs=1e-9)
    assert off_optimum(comparison, lora, fullft, 1e-6) == []


def test_otherwise_the_nearest_lr_stands_for_the_optimum_and_its_loss_is_told():
    comparison = compared(every_lr=False)
    lora, fullft = comparison.lora[64], comparison.fullft
    runs = runs_at_optimum(comparison, lora)
    assert (set(runs["lr"]), set(runs["weight"]), len(runs)) == ({3e-3}, {1.0}, 3)
    lost = CURVATURE * math.log(3e-3 / OPTIMUM) ** 2
    assert pair_at_optimum(comparison, lora, fullft).by_seed[0].loc[2:].mean() == pytest.approx(lost, rel=0.01)
    [problem] = off_optimum(comparison, lora, fullft, 9 * lost)
    assert f"add {lost:.4f} nats" in problem.text
    assert problem.remedy is not None
    assert off_optimum(comparison, lora, fullft, 11 * lost) == []
