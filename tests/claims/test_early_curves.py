"""Claims C1 to C3 on training curves of several ranks at one LR."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from ..handmade.lora import lora_run, lora_tables, luck, nll
from . import judged, verdict_is

SEEDS = range(5)
MARGIN = 0.02 * 0.9  # of the fall from 3.0 nats to 2.1


def early(excess, seeds=SEEDS, ranks=(4, 16, 64), steps=128):
    """Make runs whose loss is above that of an infinite rank by `excess(seed, step)` * 64/3 / rank nats from step 2."""

    def loss(run, step):
        return nll(run, step) + (excess(run["seed"], step) * 64 / 3 / run["rank"] if step > 1 else 0.0)

    final = {"steps": steps, "final_valid_nll": 2.1, "final_test_nll": 2.0}
    return lora_tables([lora_run(rank, seed=seed, **final) for rank in ranks for seed in seeds], nll=loss)


def growing(size, wobble=0.1):
    """Return a difference of ranks 16 and 64 that grows with log step, a little more or less by seed."""
    return lambda seed, step: size * math.log10(step) * (1 + luck(seed, size=wobble))


@pytest.mark.parametrize(
    ("claim", "excess", "verdict"),
    [
        # Rank 4, four times as far from rank 16 as rank 64 is, doesn't count.
        ("C1", growing(0.3 * MARGIN), "confirmed"),
        ("C1", growing(1.5 * MARGIN), "contradicted"),
        ("C1", growing(0.55 * MARGIN, wobble=0.6), "inconclusive"),
        ("C2", growing(0.001), "confirmed"),
        ("C2", lambda seed, step: 0.02 / step, "contradicted"),
        ("C2", lambda seed, step: 0.01 * step ** luck(seed, size=0.3), "inconclusive"),
        ("C3", growing(-0.001), "confirmed"),
        ("C3", growing(0.001), "contradicted"),
    ],
)
def test_verdicts(claim, excess, verdict):
    row = judged(claim, *early(excess))
    verdict_is(row, verdict, "r16 - r64")
    assert row["ci_low"] <= row["estimate"] <= row["ci_high"]
    assert row["n_runs"] == 10


def test_what_they_need():
    claim = "C2"  # all three judge the same difference
    few = judged(claim, *early(growing(-0.001), seeds=range(2)))
    verdict_is(few, "inconclusive", "2 paired seeds")
    assert few["decide_seeds"] >= 3
    low = judged(claim, *early(growing(-0.001), ranks=(1, 4, 16)))
    verdict_is(low, "setting not met", "two ranks of 16 or more (here r1, r4, r16)")
    assert judged(claim, *early(growing(-0.001), ranks=(1, 16)))["verdict"] == "inconclusive"
    runs, curves = early(growing(-0.001))
    assert judged(claim, runs, curves.iloc[:0])["verdict"] == "inconclusive"
    fullft = runs.assign(method="fullft", rank=pd.NA, placement=None).drop_duplicates(["lr", "seed"])
    assert judged(claim, fullft, curves)["verdict"] == "not tested"
    lost = (runs["rank"] == 64) & (runs["seed"] == 4)
    runs.loc[lost, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    assert "1 runs at that LR diverged" in judged(claim, runs, curves)["reason"]
