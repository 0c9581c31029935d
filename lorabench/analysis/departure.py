"""Departures: the step at which an arm's learning curve leaves the curve that the best arms share.

`paired_departure` is what claims judge. It needs several seeds. `departures` is its counterpart for the envelopes of a
figure, which are made from one seed, with the noise of the final losses as the measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_table, each_arm, with_arm_columns
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.noise import sigma_of
from lorabench.analysis.paired_curves import PairedCurves
from lorabench.analysis.rules import LEVEL

WINDOWS = 8
"""The number of windows of steps, equally long on a logarithmic axis, in which a departure is sought."""


@dataclass(frozen=True)
class Departure:
    """Whether and where a curve leaves another for good."""

    first: int | None
    """The first step of the window from which it has left; None if it has not left."""
    before: int | None
    """The first step of the window before; None without one, or if it has not left."""
    past: int | None
    """The first step of the window after, from which on it has surely left: the curve leaves somewhere within a window,
    and the steps of that window, which chose it, are no evidence of what comes after. None if it has not left."""
    growth: Estimate | None
    """The slope of the gap against log10(step) from there on, per tenfold steps. If the curve stays above to the end
    but the gap does not grow, it is the slope from where it stays above; None if it does not stay above."""

    @property
    def left(self) -> bool:
        """Whether it has left."""
        return self.first is not None


def paired_departure(curves: PairedCurves, margin: float) -> Departure:
    """Find where one arm's loss leaves another's because the arm runs out of capacity.

    The gap must lie above the margin in each window to the end, with an interval above 0 that holds for all WINDOWS
    windows at once. LoRA starts slowly, since B is zero, and a gap that shrinks again is no lack of capacity; so the
    departure is the window with the smallest gap of these, from which on the gap must grow. The last window alone shows
    no growth, so no departure is sought there.

    Args:
        curves: the loss of the arm minus that of the other.
        margin: the least gap that matters, in nats per token.
    """
    windows = curves.windows(WINDOWS)
    level = 1 - LEVEL / max(1, len(windows))
    means = curves.means(windows)
    above = [gap.known and gap.value >= margin and gap.interval(level)[0] > 0 for gap in means]
    start = _last_stretch(np.array(above, bool), 1)
    if start is None:
        return Departure(None, None, None, None)
    stretch = len(windows) - 1 - start
    if stretch < 1:
        return Departure(None, None, None, curves.slope(windows[start][0]))
    place = min(range(start, len(windows) - 1), key=lambda index: means[index].value)
    first = windows[place][0]
    growth = curves.slope(first)
    # The lowest of several windows gives a slope that noise alone makes larger, so the level is divided by them.
    if growth.known and growth.interval(1 - LEVEL / stretch)[0] > 0:
        return Departure(first, windows[place - 1][0] if place else None, windows[place + 1][0], growth)
    return Departure(None, None, None, curves.slope(windows[start][0]))


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
