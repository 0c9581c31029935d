"""The panel of a metric over RL training, by arm, which figures 7 and 8 have, and the rows that it plots."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lorabench.analysis.arms import ARM, arm_label
from lorabench.analysis.rewards import reward_curves
from lorabench.figures import style

CURVE_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "split", "lr", "step", "episodes", "mean", "sd", "n_seeds"),
]

# A training batch has few problems, and each step has others, so training metrics are running means over this share of
# the steps.
_SMOOTH = 1 / 20


def curve_rows(
    runs: pd.DataFrame, curves: pd.DataFrame, split: str, metric: str, beside: Sequence[str] = ()
) -> pd.DataFrame:
    """Return a metric over the training of each arm near its optimal LR: its mean and standard deviation over seeds.

    Metrics of the split `train` are measured on each step's batch, so they are running means over a twentieth of the
    steps.

    Args:
        runs: RL runs, as for `reward_curves`.
        curves: their curves, as for `reward_curves`.
        split: a split of the curves, or the name of a further problem set.
        metric: a metric of the curves; it becomes the `element` of the rows.
        beside: further metrics of the split; the mean of each gets a column.

    Returns:
        One row per arm and step, with the columns CURVE_COLUMNS and `beside`.
    """
    rows = _metric_rows(runs, curves, split, metric)
    for name in beside:
        other = _metric_rows(runs, curves, split, name).rename(columns={"mean": name})
        rows = rows.merge(other[[*ARM, "step", name]], how="left", on=[*ARM, "step"])
    rows["arm"] = [arm_label(row) for _, row in rows.iterrows()]
    return rows.assign(element=metric, split=split).reindex(columns=[*CURVE_COLUMNS, *beside])


def _metric_rows(runs: pd.DataFrame, curves: pd.DataFrame, split: str, metric: str) -> pd.DataFrame:
    rows = reward_curves(runs, curves, split, metric)
    if split == "train":
        for _, arm in rows.groupby(ARM, dropna=False):
            window = max(1, round(_SMOOTH * len(arm)))
            smooth = arm[["mean", "sd"]].astype(float).rolling(window, center=True, min_periods=1).mean()
            rows.loc[arm.index, ["mean", "sd"]] = smooth
    return rows


def draw_curves(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    """Draw the rows of one panel: the mean of each arm as a line, and its standard deviation over seeds as a band."""
    for arm, points in rows.groupby("arm"):
        look, steps = styles[str(arm)], points["step"].astype(float)
        mean, sd = points["mean"].astype(float), points["sd"].astype(float)
        axes.fill_between(steps, mean - sd, mean + sd, color=look.colour, alpha=0.15, linewidth=0, zorder=1)
        axes.plot(steps, mean, **look.line)
    axes.set_xlabel("training step")
    # Runs that were stopped at once have only a point at step 0.
    axes.set_xlim(0, max(1, axes.get_xlim()[1]))
    # No metric is negative, but a band may be, and so is half of the range that Matplotlib gives to zeros.
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, -0.04 * high))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
