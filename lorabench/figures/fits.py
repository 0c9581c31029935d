"""The numbers by which claims are judged, as rows of a figure: optimal LRs, lowest losses, margins and departures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ARM, arm_label, arm_table, rows_of, with_arm_columns, with_losses
from lorabench.analysis.comparison import Arm, Comparison, Judging, comparisons
from lorabench.analysis.estimate import Estimate, ExampleLosses
from lorabench.analysis.optima import Departure, pair_at_optimum, paired_departure
from lorabench.figures.grid import PANEL
from lorabench.store.tables import Tables

_OPTIMA = ["arm", "lr", "lr_low", "lr_high", "resolved", "nll", "nll_low", "nll_high", "n_seeds", "at_edge", "fitted"]


def compared(tables: Tables, runs: pd.DataFrame | None = None) -> list[Comparison]:
    """Return the comparisons of a figure's runs, or of other runs, with the losses by test example."""
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    return comparisons(with_arm_columns(tables.runs if runs is None else runs), tables.curves, judging)


def optimum(comparison: Comparison, arm: Arm) -> dict[str, Any] | None:
    """Return the fitted optimum of an arm; None if none of its runs finished.

    Returns:
        lr_best (the LR of the grid with the lowest loss), lr, lr_low and lr_high (the optimal LR with its 95% interval;
        at the edge of the grid, or without a fit, lr_best without an interval), resolved (whether the grid resolves
        it), nll, nll_low and nll_high (the fitted minimum of the test loss with its 95% interval, NaN where its error
        is not known; without a fit, the mean loss at lr_best), n_seeds, at_edge (whether lr_best is at the edge of its
        grid), and fitted (whether there is a fit).
    """
    fit, label = comparison.fit, arm_label(arm)
    if label not in fit.grids:
        return None
    grid = fit.grids[label]
    best = float(grid.lrs[grid.centre])
    row = {
        "lr_best": best,
        "lr": best,
        "lr_low": math.nan,
        "lr_high": math.nan,
        "resolved": False,
        "at_edge": grid.edge is not None,
    }
    if label not in fit.minima:
        at_best = with_losses(comparison.rows[label]).query("lr == @best and status == 'done'")
        mean = {"nll": float(at_best["test_loss"].astype(float).mean()), "nll_low": math.nan, "nll_high": math.nan}
        return row | mean | {"n_seeds": at_best["seed"].nunique(), "fitted": False}
    if grid.edge is None:
        low, high = fit.optima[label].interval()
        row |= {"lr": math.exp(fit.optima[label].value), "lr_low": math.exp(low), "lr_high": math.exp(high)}
        row |= {"resolved": fit.resolved[label]}
    return row | with_interval("nll", fit.minima[label]) | {"n_seeds": fit.n_seeds[label], "fitted": True}


def optima(of: Sequence[Comparison]) -> pd.DataFrame:
    """Return one row per arm of comparisons with a finished run: ARM, arm (its label), and what `optimum` returns."""
    rows = [
        arm | {"arm": arm_label(arm)} | row
        for comparison in of
        for arm in comparison.arms
        if (row := optimum(comparison, arm))
    ]
    return arm_table(rows, _OPTIMA)


def fitted_minima(of: Sequence[Comparison]) -> pd.DataFrame:
    """Return the rows of `optima` whose runs determine a minimum."""
    rows = optima(of)
    minima: pd.DataFrame = rows[rows["fitted"].astype(bool)]
    return minima


def with_interval(name: str, estimate: Estimate, low: str = "", high: str = "") -> dict[str, float]:
    """Return an estimate and the ends of its 95% interval as columns, by default `<name>_low` and `<name>_high`."""
    ends = estimate.interval()
    return {name: estimate.value, low or f"{name}_low": ends[0], high or f"{name}_high": ends[1]}


def margin_band(comparison: Comparison, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the band from the lowest fitted loss of a comparison up by its margin: no row without either.

    Args:
        comparison: the comparison.
        rows: those rows of it from `fitted_minima` whose lowest loss counts.
    """
    if rows.empty or comparison.margin.problem:
        return pd.DataFrame()
    lowest = float(rows["nll"].min())
    ends = {"nll": lowest, "nll_low": lowest, "nll_high": lowest + comparison.margin.value}
    return rows[PANEL].iloc[[0]].assign(**ends)


def judged_departures(comparison: Comparison) -> dict[int, Departure]:
    """Return where each LoRA rank leaves the curve of the highest rank, as claim A3 judges it, by rank.

    Ranks are left out where something speaks against a verdict on them, such as too few seeds or training losses.
    """
    highest = comparison.highest
    if highest is None or comparison.margin.problem:
        return {}
    departures = {}
    for rank, arm in comparison.lora.items():
        if rank != highest["rank"] and not comparison.problems([arm, highest]):
            curves = pair_at_optimum(comparison, arm, highest)
            # Without training losses of both ranks nothing is known of it.
            if curves.n_seeds:
                departures[rank] = paired_departure(curves, comparison.margin.value)
    return departures


def departure_rows(of: Sequence[Comparison], envelope: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return the step at which each rank leaves, with the values of its envelope there.

    Args:
        of: the comparisons.
        envelope: columns ARM, step (from 1 on) and `columns`.
        columns: what to interpolate between the steps of the envelope, along log(step).
    """
    rows = []
    for comparison in of:
        for rank, departure in judged_departures(comparison).items():
            arm = comparison.lora[rank]
            curve = rows_of(envelope, arm).sort_values("step")
            if departure.first is not None and len(curve):
                x, steps = math.log(departure.first), np.log(curve["step"].to_numpy(float))
                at = {name: np.interp(x, steps, curve[name].to_numpy(float)) for name in columns}
                rows.append(arm | {"step": departure.first} | at)
    return pd.DataFrame(rows, columns=[*ARM, "step", *columns])
