"""The matrix of claims by scale: the paper's core claims against the sizes of models, each cell a verdict."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lorabench.claims.catalog import CORE
from lorabench.sources.own import Own

_WORST_FIRST = ("contradicted", "inconclusive", "confirmed", "setting not met", "not tested")

COLUMNS = (
    *("claim_id", "statement", "unit", "paper_value", "scale", "parameters", "origin", "source", "verdict"),
    *("borderline", "estimate", "ci_low", "ci_high", "scope", "n_runs", "reason", "others"),
)
"""The columns of the matrix as a tidy table. `origin` is the source or preset that decides the cell, and `others` says
what others of the same scale find."""


def matrix(judged: pd.DataFrame, own: Sequence[Own] = ()) -> pd.DataFrame:
    """Return the matrix as a tidy table, one row for each core claim and scale, by claim and ascending size.

    Where several sources are of one scale, the worst verdict decides the cell, as within a verdict over several
    comparisons: contradicted, inconclusive, confirmed, setting not met, not tested. Without any runs behind it a
    verdict is `not tested`.

    Args:
        judged: the claims of all studies, as from `studies.judge`.
        own: presets of one's own; the scale of each claim's runs says in which column it stands.
    """
    parts = [judged.assign(origin=judged["source"])]
    parts += [preset.claims[preset.claims["scale"].notna()].assign(origin=preset.name) for preset in own]
    every = pd.concat(parts, ignore_index=True)
    every = every[every["claim_id"].isin(CORE)]
    every.loc[every["n_runs"].fillna(0).eq(0), "verdict"] = "not tested"
    # Models of nearly one size share a column, whose place is that of the smallest.
    place = every.groupby("scale")["parameters"].min()
    every = every.assign(parameters=every["scale"].map(place))
    rows = []
    for claim_id in CORE:
        of_claim = every[every["claim_id"] == claim_id].sort_values("parameters", kind="stable")
        for _, cell in of_claim.groupby(["parameters", "scale"], sort=True):
            # Of equal verdicts, one with a number is shown.
            order = 2 * cell["verdict"].map(_WORST_FIRST.index) + cell["estimate"].isna()
            deciding, *others = cell.loc[order.sort_values(kind="stable").index].to_dict("records")
            said = [f"{row['origin']}: {row['verdict']}" for row in others if row["verdict"] != "not tested"]
            rows.append({**deciding, "others": "; ".join(said)})
    return pd.DataFrame(rows, columns=list(COLUMNS))
