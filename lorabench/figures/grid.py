"""What figures are made of: the rows that they plot, with the numbers by which claims are judged, and panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.arms import (
    ARM,
    arm_label,
    arm_labels,
    arm_table,
    check_runs,
    each_arm,
    with_arm_columns,
    with_losses,
)
from lorabench.analysis.comparison import Arm, Comparison, Judging, comparisons
from lorabench.analysis.curves import PairedCurves, metric_points
from lorabench.analysis.estimate import Estimate, ExampleLosses
from lorabench.analysis.optima import Departure, pair_at_optimum, paired_departure, ratio_interval
from lorabench.analysis.rewards import with_error_rates
from lorabench.figures import style
from lorabench.figures.style import SIGMA, ArmStyle
from lorabench.store.checks import is_rl
from lorabench.store.tables import Tables

PANEL = ["model", "dataset", "batch_size", "steps"]
"""The columns of a panel: losses of different models, data, batch sizes or lengths are never drawn together."""

ARM_COLUMNS = [*PANEL, "arm", "method", "rank", "placement"]
"""The first columns of what a figure plots."""

Styles = Mapping[str, ArmStyle]
"""The look of each arm, by its label."""


def tidy(parts: Mapping[str, pd.DataFrame], columns: list[str], *tables: pd.DataFrame) -> pd.DataFrame:
    """Join what a figure plots into one table with the given columns: tables, and parts by their `element`.

    Rows of the parts that have a method get the label of their arm as `arm`.
    """
    kept = [rows.reindex(columns=columns) for rows in tables if len(rows)]
    for element, rows in parts.items():
        if len(rows):
            labelled = rows.assign(arm=arm_labels(rows)) if "method" in rows and "arm" not in rows else rows
            kept.append(labelled.assign(element=element).reindex(columns=columns))
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=columns)


def only(rows: pd.DataFrame, element: str) -> pd.DataFrame:
    """Return the rows of one element."""
    return rows[rows["element"] == element]


def diverged_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that diverged, which every figure lists in what it plots."""
    return runs[runs["status"] == "diverged"]


def rows_of(runs: pd.DataFrame, arm: Mapping[str, Any] | pd.Series, columns: Sequence[str] = ARM) -> pd.DataFrame:
    """Return the rows that agree with an arm in those of the columns that they have; null equals null."""
    chosen = pd.Series(True, index=runs.index)
    for name in (name for name in columns if name in runs):
        value = arm.get(name)
        same = runs[name].isna() if value is None or pd.isna(value) else runs[name].eq(value).fillna(False)
        chosen &= same.astype(bool)
    return runs[chosen]


def compared(tables: Tables, runs: pd.DataFrame | None = None) -> list[Comparison]:
    """Return the comparisons of a figure's runs, or of others, by test example; losses of RL are error rates."""
    runs = tables.runs if runs is None else runs
    runs = with_error_rates(runs) if is_rl(runs).any() else runs
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    return comparisons(with_arm_columns(runs), tables.curves, judging)


def optimum(comparison: Comparison, arm: Arm) -> dict[str, Any] | None:
    """Return the fitted optimum of an arm; None if none of its runs finished.

    Returns:
        lr_best (the LR of the grid with the lowest loss), lr, lr_low and lr_high (the optimal LR with its 95% interval;
        at the edge of the grid, or without a fit, lr_best alone), resolved (whether the grid resolves it), nll, nll_low
        and nll_high (the fitted minimum of the test loss with its 95% interval; without a fit, the mean loss at
        lr_best), n_seeds, at_edge (whether lr_best is at the edge of its grid), and fitted. NaN is not known.
    """
    fit, label = comparison.fit, arm_label(arm)
    if label not in fit.grids:
        return None
    grid = fit.grids[label]
    best = float(grid.lrs[grid.centre])
    row = {"lr_best": best, "lr": best, "lr_low": math.nan, "lr_high": math.nan, "resolved": False}
    row |= {"at_edge": grid.edge is not None, "fitted": label in fit.minima}
    if label not in fit.minima:
        at_best = with_losses(comparison.rows[label]).query("lr == @best and status == 'done'")
        mean = {"nll": float(at_best["test_loss"].astype(float).mean()), "nll_low": math.nan, "nll_high": math.nan}
        return row | mean | {"n_seeds": at_best["seed"].nunique()}
    if grid.edge is None:
        low, high = fit.optima[label].interval()
        row |= {"lr": math.exp(fit.optima[label].value), "lr_low": math.exp(low), "lr_high": math.exp(high)}
        row |= {"resolved": fit.resolved[label]}
    return row | with_interval("nll", fit.minima[label]) | {"n_seeds": len(fit.seeds[label])}


def optima(parts: Sequence[Comparison], fitted: bool = False) -> pd.DataFrame:
    """Return ARM, arm (its label) and the `optimum` of each arm with a finished run, or only of arms with a fit."""
    rows = [
        arm | {"arm": arm_label(arm)} | row
        for comparison in parts
        for arm in comparison.arms
        if (row := optimum(comparison, arm)) and row["fitted"] >= fitted
    ]
    columns = ["arm", "lr", "lr_low", "lr_high", "resolved", "nll", "nll_low", "nll_high", "n_seeds", "at_edge"]
    return arm_table(rows, [*columns, "fitted"])


def with_interval(name: str, estimate: Estimate) -> dict[str, float]:
    """Return an estimate and the ends of its 95% interval as the columns `<name>`, `<name>_low` and `<name>_high`."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), (estimate.value, *estimate.interval()), strict=True))


def lr_ratio(log_ratio: Estimate) -> dict[str, float]:
    """Return a ratio with its 95% interval as the columns `ratio`, `ratio_low` and `ratio_high`, from its logarithm."""
    low, high = ratio_interval(log_ratio)
    return {"ratio": math.exp(log_ratio.value), "ratio_low": low, "ratio_high": high}


def margin_band(comparison: Comparison, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the band from the lowest loss of a comparison's fitted `optima` up by its margin, if it has both."""
    if rows.empty or comparison.margin.problem:
        return pd.DataFrame()
    lowest = float(rows["nll"].min())
    return rows[PANEL].iloc[[0]].assign(nll=lowest, nll_low=lowest, nll_high=lowest + comparison.margin.value)


def judged_departures(comparison: Comparison) -> dict[int, tuple[PairedCurves, Departure]]:
    """Return where each LoRA rank leaves the curve of the highest rank, as claim A3 judges it, by rank.

    Each departure comes after the curves that it was found in. Ranks are left out where something speaks against a
    verdict on them, such as too few seeds or training losses.
    """
    highest, departures = comparison.highest, dict[int, tuple[PairedCurves, Departure]]()
    if highest is None or comparison.margin.problem:
        return departures
    for rank, arm in comparison.lora.items():
        if rank != highest["rank"] and not comparison.problems([arm, highest]):
            curves = pair_at_optimum(comparison, arm, highest)
            # Without training losses of both ranks nothing is known of it.
            if curves.n_seeds:
                departures[rank] = curves, paired_departure(curves, comparison.margin.value)
    return departures


def departure_rows(parts: Sequence[Comparison], envelope: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the step at which each rank leaves, with columns of its envelope interpolated there along log(step)."""
    rows = []
    for comparison in parts:
        for rank, (_, departure) in judged_departures(comparison).items():
            arm = comparison.lora[rank]
            curve = rows_of(envelope, arm).sort_values("step")
            if departure.first is not None and len(curve):
                x, steps = math.log(departure.first), np.log(curve["step"].to_numpy(float))
                at = {name: np.interp(x, steps, curve[name].to_numpy(float)) for name in columns}
                rows.append(arm | {"step": departure.first} | at)
    return pd.DataFrame(rows, columns=[*ARM, "step", *columns])


def titled(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return a title and the rows of each panel; the title names what distinguishes the panel from the others."""
    several_batch_sizes = frame["batch_size"].nunique() > 1
    several_lengths = (frame.groupby(PANEL[:-1], dropna=False)["steps"].nunique() > 1).any()
    titles = []
    for (model, dataset, batch_size, steps), rows in frame.groupby(PANEL, dropna=False):
        # Of a model's id on the hub it has the part after the owner.
        title = f"{str(model).rpartition('/')[2]} · {dataset}"
        title += f" · batch {batch_size}" if several_batch_sizes else ""
        titles.append((title + (f" · {steps} steps" if several_lengths else ""), rows))
    return titles


def panels(
    plotted: pd.DataFrame, each: int = 1, strip: float = 0.0
) -> tuple[Figure, Styles, list[tuple[pd.DataFrame, list[Axes]]]]:
    """Make a figure with one panel, or two side by side (`each`), for each model, dataset, batch size and length.

    Above the panels a `strip` is kept free for marks, whose height is in points. Returned are the figure, the styles of
    its arms, and of each group its rows and its panels.
    """
    groups = titled(plotted)
    columns = 2 if each == 2 else min(2, len(groups))
    rows = math.ceil(each * len(groups) / columns)
    figure = style.new_figure((style.PANEL_HEIGHT + (0.4 if each == 2 else 0.0)) * rows)
    drawn = []
    for place, (title, group) in enumerate(groups):
        axes = [figure.add_subplot(rows, columns, place * each + number + 1) for number in range(each)]
        axes[0].set_title(title, pad=strip + 18, parse_math=False)
        for further in axes[1:]:
            further.set_title("", pad=strip + 18)
        drawn.append((group, axes))
    # What others published is grey.
    return figure, style.arm_styles(plotted[plotted["element"] != "published"]), drawn


def lines(axes: Axes, rows: pd.DataFrame, x: str, y: str, styles: Styles, **look: Any) -> None:
    """Draw a line for each arm through its rows, in their order, with a pale band from `<y>_low` to `<y>_high`."""
    for arm, points in rows.groupby("arm"):
        at = points[x].astype(float)
        axes.plot(at, points[y].astype(float), **styles[str(arm)].line, **look)
        if f"{y}_low" in points and points[f"{y}_low"].notna().any():
            low, high = (points[f"{y}_{end}"].astype(float) for end in ("low", "high"))
            axes.fill_between(at, low, high, color=styles[str(arm)].colour, alpha=0.15, linewidth=0)


def points(axes: Axes, rows: pd.DataFrame, x: str, y: str, styles: Styles, size: float = 5.5) -> None:
    """Draw a mark for each row, with a vertical line from `<y>_low` to `<y>_high` where the rows have these columns.

    A mark has the shape of its arm and is filled, unless a column `marker` or `filled` says otherwise.
    """
    for row in rows.dropna(subset=[x, y]).to_dict("records"):
        look = styles[row["arm"]]
        if f"{y}_low" in row:
            axes.vlines(row[x], row[f"{y}_low"], row[f"{y}_high"], color=look.colour, linewidth=1.3, zorder=4)
        face = look.colour if row.get("filled", True) else "white"
        axes.plot(row[x], row[y], row.get("marker", look.marker), ms=size, mfc=face, mec=look.colour, mew=1.3, zorder=5)


def bars(axes: Axes, rows: pd.DataFrame, x: str, y: str, look: ArmStyle, size: float = 4.5, label: str = "") -> None:
    """Draw one arm's marks with bars from `<y>_low` to `<y>_high`; a mark is open where the best LR is `at_edge`."""
    for row in rows.to_dict("records"):
        # An end may be beyond the value by rounding.
        half = [[max(row[y] - row[f"{y}_low"], 0.0)], [max(row[f"{y}_high"] - row[y], 0.0)]]
        face = "white" if row["at_edge"] else look.colour
        shape: dict[str, Any] = {"fmt": look.marker, "color": look.colour, "mfc": face, "mec": look.colour, "mew": 1.2}
        shape |= {"capsize": 2.5, "ms": size, "zorder": look.zorder + 2}
        axes.errorbar(float(row[x]), row[y], half, label=label or None, **shape)


def band(axes: Axes, rows: pd.DataFrame, x: str, low: str, high: str, colour: str = "0.85", label: str = "_") -> None:
    """Fill the area between two columns."""
    at, bottom, top = (rows[name].astype(float) for name in (x, low, high))
    axes.fill_between(at, bottom, top, color=colour, linewidth=0, zorder=1, label=label)


def sigma_text(sigma: float) -> str:
    """Write the standard deviation between seeds for the note above a panel; NaN is unknown."""
    return f"{SIGMA} unknown" if math.isnan(sigma) else f"{SIGMA} {sigma:.2g}"


def seeds_text(counts: pd.Series[int]) -> str:
    """Write over how many seeds the means of a panel are taken: `3 seeds`, or `2 to 3 seeds` where they differ."""
    fewest, most = int(counts.min()), int(counts.max())
    return f"{most if fewest == most else f'{fewest} to {most}'} seed{'s' if most > 1 else ''}"


def lacking(what: str, arms: Iterable[str], drawn: Iterable[str] = ()) -> str:
    """Write for the note above a panel which arms lack something: those that are not drawn; empty if all are."""
    lost = ", ".join(sorted(set(arms) - set(drawn)))
    return f"{what}: {lost}" if lost else ""


def diverged_facts(rows: pd.DataFrame, drawn: pd.DataFrame, lack: str) -> list[str]:
    """Write how many runs of a panel diverged, and which arms therefore lack something; nothing if none did."""
    diverged = only(rows, "diverged")
    return [f"{len(diverged)} diverged", lacking(lack, diverged["arm"], drawn["arm"])] if len(diverged) else []


def envelopes(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Compute each arm's pointwise minimum of the validation NLL over its LR grid (the runs with its first seed).

    A diverged run counts up to its last finite value.

    Returns:
        One row per arm and step, ascending: step, examples and tokens (seen by that step, where the curves have them),
        value, lr and run_id (of the run with the lowest value there), n_runs (with a value there).
    """
    check_runs(runs)
    columns = ["step", "examples", "tokens", "value", "lr", "run_id", "n_runs"]
    all_points = metric_points(curves, "validation", "nll", ["run_id", "step", "examples", "tokens", "value"])
    rows: list[dict[Any, Any]] = []
    for arm, arm_runs in each_arm(runs):
        # Sorting by LR breaks ties, so that the result does not depend on the order of the table.
        grid = arm_runs.loc[arm_runs["seed"] == arm_runs["seed"].min(), ["run_id", "lr"]]
        points = all_points.merge(grid, on="run_id")
        points = points.sort_values(["step", "value", "lr"])
        points["n_runs"] = points.groupby("step")["run_id"].transform("size")
        rows += [arm | point for point in points.drop_duplicates("step")[columns].to_dict("records")]
    return arm_table(rows, columns)


def fitted_noise(parts: Sequence[Comparison]) -> pd.DataFrame:
    """Return a row per comparison: PANEL, sigma and dof (see `LossFit`; NaN if not known), n_runs (of the fit)."""
    rows = []
    for part in parts:
        sigma, n_runs = part.fit.sigma if part.fit.dof else math.nan, sum(map(len, part.fit.run_ids.values()))
        rows.append(part.arms[0] | {"sigma": sigma, "dof": part.fit.dof, "n_runs": n_runs})
    table = pd.DataFrame(rows, columns=[*PANEL, "sigma", "dof", "n_runs"])
    return table.astype({"batch_size": "Int64", "steps": "Int64", "sigma": float})
