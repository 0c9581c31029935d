"""The fitted lowest loss of each arm, as rows of a figure's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from lorabench.analysis.arms import ARM, arm_label, arm_table, with_arm_columns
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.example_losses import ExampleLosses
from lorabench.figures import style
from lorabench.store.tables import Tables

_COLUMNS = ["arm", "lr", "lr_low", "lr_high", "resolved", "nll", "nll_low", "nll_high", "n_seeds", "at_edge"]


def fitted_comparisons(tables: Tables, runs: pd.DataFrame | None = None) -> list[Comparison]:
    """Return the comparisons of a figure's runs, or of other runs, with the losses by test example."""
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    return comparisons(with_arm_columns(tables.runs if runs is None else runs), tables.curves, judging)


def fitted_rows(compared: Sequence[Comparison]) -> pd.DataFrame:
    """Return one row per arm whose runs determine a minimum.

    Its columns are ARM and arm (the label), lr (the fitted optimum) with lr_low and lr_high (95% interval), resolved
    (whether the grid resolves it), nll (the fitted minimum of the test loss) with nll_low and nll_high (95% interval;
    NaN where its error is not known), n_seeds, and at_edge (whether the best LR is at the edge of its grid).
    """
    rows = []
    for comparison in compared:
        fit = comparison.fit
        for arm in comparison.arms:
            label = arm_label(arm)
            if label not in fit.minima:
                continue
            low, high = fit.optima[label].interval()
            rows.append(
                arm
                | {"arm": label, "lr": math.exp(fit.optima[label].value)}
                | {"lr_low": math.exp(low), "lr_high": math.exp(high), "resolved": fit.resolved[label]}
                | with_interval("nll", fit.minima[label])
                | {"n_seeds": fit.n_seeds[label], "at_edge": fit.grids[label].edge is not None}
            )
    return arm_table(rows, _COLUMNS)


def with_interval(name: str, estimate: Estimate, low: str = "", high: str = "") -> dict[str, float]:
    """Return an estimate and the ends of its 95% interval as columns, by default `<name>_low` and `<name>_high`."""
    ends = estimate.interval()
    return {name: estimate.value, low or f"{name}_low": ends[0], high or f"{name}_high": ends[1]}


def margin_band(comparison: Comparison, rows: pd.DataFrame) -> dict[Any, Any] | None:
    """Return the row `margin_band` of a comparison: from its lowest fitted loss up by the margin; None without either.

    Args:
        comparison: the comparison.
        rows: its rows from `fitted_rows`.
    """
    if rows.empty or comparison.margin.problem:
        return None
    lowest = float(rows["nll"].min())
    of_panel: Mapping[str, Any] = {name: rows[name].iloc[0] for name in style.PANEL if name in ARM}
    return {
        **of_panel,
        "element": "margin_band",
        "nll": lowest,
        "nll_low": lowest,
        "nll_high": lowest + comparison.margin.value,
    }
