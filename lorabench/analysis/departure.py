"""Departures of envelopes by the noise of final losses."""

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
    """Find where each arm's envelope leaves the lowest envelope for good, by more than the seed noise.

    The criterion is that of the replication Sphere-AI-Lab/orbit (see docs/paper.md), which is meant for log-spaced
    points, with two changes. The points above must reach to the end of the curve, and the excess must grow by more than
    the noise from its lowest point among these, which is the departure. LoRA starts slowly, since B is zero, and a
    curve that joins the others later, or approaches them to the end, has not run out of capacity. Arms are compared
    within model, dataset, batch size and number of steps. Step 0 is left out, since all arms are the base model there.

    Args:
        envelopes: as from `envelopes`.
        noise: as from `seed_noise`; the noise of the final loss stands for the noise at every step.
        n_sigma: number of seed standard deviations by which a departed envelope lies above the lowest.
        consecutive: least number of points, up to the last, at which it does.
        split: the split of the envelopes, `validation` or `test`.

    Returns:
        One row per arm: step (of departure; null where the arm never leaves) and departed (null where there is no
        sigma or the envelope has fewer than `consecutive` points).
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
        start = _grows_from(points["excess"].to_numpy(float), n_sigma * sigma, consecutive)
        known = math.isfinite(sigma) and len(points) >= consecutive
        rows.append(
            arm
            | {"step": None if start is None else points["step"].iloc[start]}
            | {"departed": start is not None if known else None}
        )
    return arm_table(rows, ["step", "departed"]).astype({"step": "Int64", "departed": "boolean"})


def _grows_from(excess: np.ndarray, noise: float, length: int) -> int | None:
    """Return the index of the lowest excess of the last stretch above the noise, if the excess grows from there on."""
    start = _last_stretch(excess > noise, length)
    if start is None:
        return None
    lowest = start + int(excess[start:].argmin())
    return lowest if excess[-1] - excess[lowest] > noise else None


def _last_stretch(above: np.ndarray, length: int) -> int | None:
    """Return the start of the true values at the end of `above`; None if there are fewer than `length`."""
    below = np.flatnonzero(~above)
    start = int(below[-1]) + 1 if len(below) else 0
    return start if len(above) - start >= length else None
