"""Figure 1 of the paper: learning curves by rank, each the lowest loss over learning rates at every step."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lorabench.analysis.arms import ARM, arm_label
from lorabench.analysis.curves import envelopes
from lorabench.analysis.departure import departures
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.errors import NothingToDrawError
from lorabench.figures import style
from lorabench.store.tables import Tables

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "step", "examples", "tokens"),
    *("nll", "nll_low", "nll_high", "lr", "run_id", "n_runs"),
]


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (one step of an arm), `departure` (the step at which an arm
    leaves the noise band for good), `noise_band` (from `nll_low` to `nll_high`), `before_training` (the base model) or
    `diverged` (one run). Losses are validation NLL in nats per scored token.
    """
    plotted = _plotted(tables.runs, tables.curves)
    figure, panels = style.panels(plotted)
    styles = style.arm_styles(plotted.dropna(subset=["arm"]))
    for rows, axes in panels:
        _draw_panel(axes, rows, styles)
    departure = style.mark("the arm leaves the band for good", "o", markerfacecolor="white", markeredgewidth=1.4)
    band = Patch(label=f"lowest envelope ± 2{style.SIGMA} of seeds", facecolor="0.85")
    style.legends(figure, styles, [departure, band])
    return figure, plotted


def _plotted(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    noise = seed_noise(runs)
    envelope = envelopes(runs, curves)
    left = departures(envelope, noise)
    # A log axis has no step 0, so the base model's loss is written above the panel instead.
    envelope = envelope[envelope["step"] > 0].rename(columns={"value": "nll"})
    left = left[left["departed"].fillna(False)].merge(envelope[[*ARM, "step", "nll"]], on=[*ARM, "step"])
    diverged = runs.loc[runs["status"] == "diverged", [*ARM, "lr", "run_id"]]
    of_arms = {"envelope": envelope, "departure": left, "diverged": diverged}
    parts = [part.assign(element=element) for element, part in of_arms.items()]
    for part in parts:
        part["arm"] = [arm_label(row) for _, row in part.iterrows()]
    parts += [_noise_band(envelope, noise), _before_training(runs, curves)]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise NothingToDrawError("no validation curves beyond step 0")
    return pd.concat(parts).reindex(columns=_COLUMNS).reset_index(drop=True)


def _noise_band(envelope: pd.DataFrame, noise: pd.DataFrame) -> pd.DataFrame:
    """Return the band of two sigma around the lowest envelope of each panel whose sigma is known."""
    band = envelope.groupby([*style.PANEL, "step"], as_index=False, dropna=False)["nll"].min()
    sigma = pd.Series([sigma_of(noise, row, "validation") for _, row in band.iterrows()], dtype=float)
    around: pd.DataFrame = band.assign(nll_low=band["nll"] - 2 * sigma, nll_high=band["nll"] + 2 * sigma)
    return around.assign(element="noise_band").dropna(subset=["nll_low"])


def _before_training(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    start = curves[(curves["step"] == 0) & (curves["split"] == "validation") & (curves["metric"] == "nll")]
    joined = start.merge(runs[["run_id", *style.PANEL]], on="run_id")
    base = joined.groupby(style.PANEL, as_index=False, dropna=False).agg(nll=("value", "median"))
    return base.assign(element="before_training", step=0)


def _draw_panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    elements = {str(element): part for element, part in rows.groupby("element")}
    nothing = rows.iloc[:0]
    band = elements.get("noise_band", nothing)
    axes.fill_between(
        band["step"].astype(float), band["nll_low"], band["nll_high"], color="0.85", linewidth=0, zorder=1
    )
    drawn = elements.get("envelope", nothing)
    for arm, points in drawn.groupby("arm"):
        axes.plot(points["step"].astype(float), points["nll"], **styles[str(arm)].line)
    for point in elements.get("departure", nothing).to_dict("records"):
        colour = styles[point["arm"]].colour
        axes.plot(point["step"], point["nll"], "o", ms=6, mfc="white", mec=colour, mew=1.5, zorder=4)
    axes.set(xscale="log", xlabel="training step", ylabel="validation NLL (nats / token)")
    style.plain_log_ticks(axes)
    style.note(axes, " · ".join(_facts(elements, drawn)))


def _facts(elements: dict[str, pd.DataFrame], drawn: pd.DataFrame) -> list[str]:
    """Return the texts for what a panel cannot show as a line."""
    facts = []
    if "before_training" in elements:
        facts.append(f"before training {elements['before_training']['nll'].iloc[0]:.2f}")
    if "noise_band" in elements:
        band = elements["noise_band"].iloc[0]
        facts.append(style.sigma_text((band["nll_high"] - band["nll_low"]) / 4))
    else:
        facts.append(style.sigma_text(math.nan))
    diverged = elements.get("diverged")
    if diverged is not None:
        facts += style.diverged_text(diverged)
        lost = sorted(set(diverged["arm"]) - set(drawn["arm"]))
        if lost:
            facts.append(f"no curve: {', '.join(lost)}")
    return facts
