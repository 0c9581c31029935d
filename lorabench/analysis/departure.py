"""Departure: the step at which an arm leaves the curve that the best arms share."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_table, each_arm, with_arm_columns
from lorabench.analysis.noise import sigma_of


def departures(
    envelopes: pd.DataFrame,
    noise: pd.DataFrame,
    n_sigma: float = 2.0,
    consecutive: int = 3,
    split: str = "validation",
) -> pd.DataFrame:
    """Where an arm leaves the lowest envelope for good: from there on it lies above by more than the seed noise.

    The criterion is Orbit's (paper notes, claim A3), meant for log-spaced points, with one change: the points must
    reach to the end of the curve. LoRA starts slowly, since B is zero, and a curve that joins the others later has
    not run out of capacity. Arms are compared within model, dataset, batch size and length. Step 0 is left out,
    since there all arms are the base model.

    Args:
        envelopes: as from `envelopes`.
        noise: as from `seed_noise`: the noise of the final loss stands for that of every step.
        n_sigma: how many seed standard deviations count as above.
        consecutive: how many points, up to the last, must at least be above.
        split: that the envelopes were taken on.

    Returns:
        One row per arm: step (null where it never leaves), departed (null where that can't be told: no sigma, or
        fewer than `consecutive` points).
    """
    trained = with_arm_columns(envelopes[envelopes["step"] > 0])
    lowest = trained.groupby(["model", "dataset", "batch_size", "steps", "step"], dropna=False)["value"].transform(
        "min"
    )
    excess = trained.assign(excess=trained["value"] - lowest)
    rows = []
    for arm, points in each_arm(excess):
        sigma = sigma_of(noise, arm, split)
        points = points.sort_values("step")
        start = _last_stretch((points["excess"] > n_sigma * sigma).to_numpy(bool), consecutive)
        known = math.isfinite(sigma) and len(points) >= consecutive
        rows.append(
            arm
            | {"step": None if start is None else points["step"].iloc[start]}
            | {"departed": start is not None if known else None}
        )
    return arm_table(rows, ["step", "departed"]).astype({"step": "Int64", "departed": "boolean"})


def _last_stretch(above: np.ndarray, length: int) -> int | None:
    """Where the trues that reach to the end begin, if there are at least `length` of them."""
    below = np.flatnonzero(~above)
    start = int(below[-1]) + 1 if len(below) else 0
    return start if len(above) - start >= length else None
