"""Own presets beside the public sources: their verdicts as a column of the matrix, and their measurements."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lorabench.errors import UserError
from lorabench.sources.measurements import Measurement, Z
from lorabench.store.io import table_path
from lorabench.store.io import read_claims

_SIZES = {"k": 1e3, "M": 1e6, "B": 1e9}


PROJECT = "lorabench"
"""The source that all presets of this project are: one more preset is not one more laboratory."""

TINY, BELOW = "tiny", 1e7
"""The scale of all models with fewer parameters."""


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
    columns = pd.DataFrame(scales, columns=["scale", "parameters"], index=claims.index)
    return Own(name, claims.join(columns))


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


def own_measurements(own: Own) -> list[Measurement]:
    """Return the fitted numbers of a preset that sources measure too, from its table `claims`.

    They are those of the comparison that decides each claim: B1 and B10 for the ratio of learning rates, B2 for the gap
    of losses, D1 for its growth, and F1 for rank 1 in RL.
    """
    measured = []
    of_claims = (
        ("B1", "lr_ratio", "sft"),
        ("B10", "lr_ratio", "rl"),
        ("B2", "loss_gap", "sft"),
        ("D1", "gap_growth", "sft"),
        ("F1", "rank_1_gap", "rl"),
    )
    for claim_id, measure, task in of_claims:
        row = own.claims[own.claims["claim_id"] == claim_id]
        numbers = (
            [float(row[column].iloc[0]) for column in ("estimate", "ci_low", "ci_high")] if len(row) else [math.nan]
        )
        if not all(map(math.isfinite, numbers)) or row["scale"].isna().any():
            continue
        value, low, high = map(math.log, numbers) if measure == "lr_ratio" else numbers
        sign = -1 if measure == "rank_1_gap" else 1
        measured.append(
            Measurement(
                measure=measure,
                source=PROJECT,
                study=f"lorabench {own.name}",
                scale=str(row["scale"].iloc[0]),
                parameters=int(row["parameters"].iloc[0]),
                task=task,
                dataset=_dataset(row["scope"].iloc[0]),
                batch_size=None,
                value=sign * value,
                error=(high - low) / (2 * Z),
                counts=high > low,
                remark=f"fitted, claim {claim_id}",
                precision="fp32 weights",
                schedule="constant",
                alpha="32",
                base_kind="base",
            )
        )
    return measured


def _dataset(scope: object) -> str:
    """Return the datasets at the end of a scope such as `0.83M parameters, 50 steps, instruct, worked`."""
    parts = str(scope).split(", ")
    return ", ".join(part for part in parts if not re.search(r"parameters$|steps$", part)).removeprefix("RL on ")
