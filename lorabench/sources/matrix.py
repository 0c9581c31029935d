"""The matrix of claims by scale: the core claims against the sizes of models, of public sources and of own presets."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lorabench.claims.judge import CORE
from lorabench.errors import UserError
from lorabench.store.io import read_claims, table_path

PROJECT = "lorabench"
"""The source that all presets of this project are: one more preset is not one more laboratory."""

TINY, BELOW = "tiny", 1e7
"""The scale of all models with fewer parameters."""

COLUMNS = (
    *("claim_id", "statement", "unit", "paper_value", "scale", "parameters", "origin", "source", "verdict"),
    *("borderline", "estimate", "ci_low", "ci_high", "scope", "n_runs", "reason", "others"),
)
"""The columns of the matrix as a tidy table. `origin` is the source or preset that decides the cell, and `others` says
what others of the same scale find."""

_WORST_FIRST = ("contradicted", "inconclusive", "confirmed", "setting not met", "not tested")
_SIZES = {"k": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class Own:
    """The verdicts of a preset."""

    name: str
    claims: pd.DataFrame
    """The table `claims` with the columns scale (as `8B`; None for a claim that was judged on no models) and
    parameters (NaN there). It lacks run_ids."""


def read_own(folder: Path, name: str) -> Own:
    """Read the table `claims` of a preset, finished or published; the scale of each claim is that of its scope.

    Raises:
        UserError: there is no such table, or it is from another version.
    """
    if table_path(folder, "claims") is None:
        raise UserError(f"no table claims.parquet or claims.csv in {folder}")
    claims = read_claims(folder, without=("run_ids",))
    scales = [_scale(scope) for scope in claims["scope"]]
    return Own(name, claims.join(pd.DataFrame(scales, columns=["scale", "parameters"], index=claims.index)))


def _scale(scope: object) -> tuple[str | None, float]:
    """Return the scale and the number of parameters at the start of a scope such as `0.83M parameters, 50 steps`.

    Of a range, as in `0.27M to 0.83M parameters`, the larger one counts.
    """
    match = re.match(r"(?:[\d.]+[kMB] to )?([\d.]+)([kMB]) parameters", str(scope))
    if match is None:
        return None, math.nan
    number, unit = float(match[1]), match[2]
    parameters = number * _SIZES[unit]
    if parameters < BELOW:
        return TINY, parameters
    return (f"{number:.2g}{unit}" if number < 10 else f"{number:.0f}{unit}"), parameters


def datasets_of_scope(scope: object) -> str:
    """Return the datasets at the end of a scope such as `0.83M parameters, 50 steps, instruct, worked`."""
    parts = str(scope).split(", ")
    return ", ".join(part for part in parts if not re.search(r"parameters$|steps$", part)).removeprefix("RL on ")


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
    every = every.assign(parameters=every["scale"].map(every.groupby("scale")["parameters"].min()))
    rows = []
    for claim_id in CORE:
        verdicts = every[every["claim_id"] == claim_id].sort_values("parameters", kind="stable")
        for _, cell in verdicts.groupby(["parameters", "scale"], sort=True):
            # Of equal verdicts, one with a number is shown.
            order = 2 * cell["verdict"].map(_WORST_FIRST.index) + cell["estimate"].isna()
            deciding, *others = cell.loc[order.sort_values(kind="stable").index].to_dict("records")
            said = [f"{row['origin']}: {row['verdict']}" for row in others if row["verdict"] != "not tested"]
            rows.append({**deciding, "others": "; ".join(said)})
    return pd.DataFrame(rows, columns=list(COLUMNS))
