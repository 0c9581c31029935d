"""Memorization: how many bits an adapter stores of random facts, and how many bits a dataset holds at most.

Random facts do not generalize, so the loss is measured on the facts that were trained on. Of other data, the summed
loss of the first epoch is the description length, an upper bound on what can be learned from it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.curves import train_curves
from lorabench.analysis.estimate import Estimate, combined, mean_over_seeds

BITS_PER_PARAMETER = 2.0
"""Bits that a parameter stores after long training on synthetic data (Allen-Zhu and Li, 2024, cited by the paper)."""


def is_memorisation(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs memorize random facts; none do in a table without `entropy_bits`."""
    return runs.reindex(columns=["entropy_bits"])["entropy_bits"].notna()


def description_lengths(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a dataset's description length, the summed loss of the first epoch, where every token is new. A row per
    comparison whose runs completed an epoch has ARM (FullFT, or the highest LoRA rank where it has no finished run),
    bits (mean over seeds at the best LR of its grid), run_ids."""
    rows = []
    for comparison in comparisons(runs, pd.DataFrame()):
        if comparison.runs["first_epoch_nats"].isna().all():
            continue
        grids = comparison.fit.grids
        # FullFT is the first arm, and the highest rank the last.
        finished = [arm for arm in comparison.arms if arm_label(arm) in grids]
        for arm in [comparison.fullft] if comparison.fullft in finished else finished[-1:]:
            grid, arm_runs = grids[arm_label(arm)], comparison.rows[arm_label(arm)]
            at_best = arm_runs[arm_runs["status"].eq("done") & arm_runs["lr"].eq(grid.lrs[grid.centre])]
            seeds = at_best.sort_values("seed").dropna(subset=["first_epoch_nats", "first_epoch_scored_tokens"])
            if len(seeds):
                bits = float(seeds["first_epoch_nats"].to_numpy(float).mean()) / math.log(2)
                rows.append(arm | {"bits": bits, "run_ids": list(seeds["run_id"])})
    return arm_table(rows, ["bits", "run_ids"])


def stored(minimum: Estimate, entropy_bits: float, scored_tokens: float) -> Estimate:
    """Return the bits that an arm stores of random facts, from its lowest NLL per scored token; test examples add no
    error, as the facts are all that there are."""
    bits = combined(lambda nats: entropy_bits - nats * scored_tokens / math.log(2), minimum)
    return replace(bits, example_part=None, n_examples=0)


def late_growth(runs: pd.DataFrame, curves: pd.DataFrame) -> Estimate:
    """Estimate the share of its stored bits that an arm stored in the second half of its steps, as a mean over seeds of
    runs at one LR whose validation split has the same facts; NaN without curves or without stored bits."""
    shares, names = [], ["entropy_bits", "final_test_nll", "test_scored_tokens"]
    points = train_curves(runs[["run_id", *names]], curves, split="validation")
    for _, curve in points[points["step"] > 0].groupby("run_id"):
        entropy, final_nll, tokens = map(float, curve[names].iloc[0])
        nats = entropy * math.log(2) - final_nll * tokens
        if len(curve) > 1 and nats > 0:
            steps, losses = curve["step"].to_numpy(float), curve["value"].to_numpy(float)
            halfway = float(np.interp(math.log(steps[-1] / 2), np.log(steps), losses))
            shares.append((halfway - losses[-1]) * tokens / nats)
    return mean_over_seeds(shares, f"late growth of {', '.join(sorted(runs['run_id'].astype(str)))}")
