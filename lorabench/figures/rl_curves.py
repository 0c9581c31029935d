"""A panel of a measure over RL training, by arm: the rows it plots. Figures 7 and 8 have it."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import ARM, arm_label
from lorabench.analysis.rewards import reward_curves
from lorabench.figures import style

COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "split", "lr", "step", "episodes", "mean", "sd", "n_seeds"),
]

# A training batch is a few problems, other ones at each step: running means are over this part of the steps.
_SMOOTH = 1 / 20


def curve_rows(
    runs: pd.DataFrame, curves: pd.DataFrame, split: str, metric: str, beside: Sequence[str] = ()
) -> pd.DataFrame:
    """A measure over training of each arm at its best LR: mean and standard deviation over seeds, columns COLUMNS.

    Those of the split `train`, which are of each step's batch, are running means over a twentieth of the steps.

    Args:
        runs: of RL, as for `reward_curves`.
        curves: likewise.
        split: likewise.
        metric: likewise; it is the rows' `element`.
        beside: further metrics of the split, whose means have a column each.
    """
    found = _measured(runs, curves, split, metric)
    for name in beside:
        other = _measured(runs, curves, split, name).rename(columns={"mean": name})
        found = found.merge(other[[*ARM, "step", name]], how="left", on=[*ARM, "step"])
    found["arm"] = [arm_label(row) for _, row in found.iterrows()]
    return found.assign(element=metric, split=split).reindex(columns=[*COLUMNS, *beside])


def _measured(runs: pd.DataFrame, curves: pd.DataFrame, split: str, metric: str) -> pd.DataFrame:
    found = reward_curves(runs, curves, split, metric)
    if split == "train":
        for _, arm in found.groupby(ARM, dropna=False):
            window = max(1, round(_SMOOTH * len(arm)))
            smooth = arm[["mean", "sd"]].astype(float).rolling(window, center=True, min_periods=1).mean()
            found.loc[arm.index, ["mean", "sd"]] = smooth
    return found


def draw_curves(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    """Draw the rows of one panel: a line per arm, and its standard deviation over seeds as a band."""
    for arm, points in rows.groupby("arm"):
        look, steps = styles[str(arm)], points["step"].astype(float)
        mean, sd = points["mean"].astype(float), points["sd"].astype(float)
        axes.fill_between(steps, mean - sd, mean + sd, color=look.colour, alpha=0.15, linewidth=0, zorder=1)
        axes.plot(steps, mean, **look.line)
    axes.set_xlabel("training step")
    # Runs that were stopped at once have a point at step 0 only.
    axes.set_xlim(0, max(1, axes.get_xlim()[1]))
    # No measure is negative, though a band may be, and so is half of the range that matplotlib gives to zeros.
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, -0.04 * high))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def seeds_words(rows: pd.DataFrame) -> str:
    """How many seeds the means of a panel are over."""
    fewest, most = int(rows["n_seeds"].min()), int(rows["n_seeds"].max())
    return f"{most if fewest == most else f'{fewest} to {most}'} seed{'s' if most > 1 else ''}"
