"""Arms, the units that are compared: grouping, selecting, naming and checking the runs of a table.

An arm is everything that an LR sweep leaves fixed: a method (FullFT, or LoRA of one rank, placement and
parametrization) on one model and dataset, at one batch size and number of steps. Its runs differ in learning rate and
seed only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorabench.errors import UserError
from lorabench.store.checks import check_table, listed

STANDARD = {"alpha": 32.0, "init_a": 1.0, "lr_ratio": 1.0}
"""The paper's parametrization of LoRA: alpha, A's initial scale in units of 1/sqrt(d_in), LR of B over LR of A."""

ARM = ["model", "dataset", "method", "rank", "placement", "batch_size", "steps", *STANDARD, "eps"]
"""Columns whose values identify an arm. FullFT has null for rank, placement and the parametrization of LoRA."""

OPTIONAL = ["steps", *STANDARD, "eps"]
"""Columns of ARM that a table may lack; all of its runs then count as having the same value."""

_INTEGERS = ("rank", "batch_size", "steps")


def with_arm_columns(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with every optional column of ARM; a column that it lacked is null."""
    lacking = [name for name in OPTIONAL if name not in runs]
    return runs.reindex(columns=[*runs.columns, *lacking]) if lacking else runs


def arm_label(arm: Mapping[str, Any] | pd.Series) -> str:
    """Return the short name of an arm: `FullFT`, `LoRA r8`, `LoRA r8 attn alpha 8`; standard values are omitted."""
    if arm["method"] == "fullft":
        return "FullFT"
    words = [f"LoRA r{int(arm['rank'])}"]
    if not pd.isna(arm["placement"]) and arm["placement"] != "all":
        words.append(str(arm["placement"]))
    for name, template in (("alpha", "alpha {:g}"), ("init_a", "init x{:g}"), ("lr_ratio", "LR_B/LR_A {:g}")):
        value = arm.get(name)
        if value is not None and not pd.isna(value) and value != STANDARD[name]:
            words.append(template.format(value))
    return " ".join(words)


def is_standard(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are FullFT, or LoRA in the paper's parametrization; null counts as standard."""
    standard = np.ones(len(runs), bool)
    for name, value in STANDARD.items():
        if name in runs:
            numbers = runs[name].to_numpy(float, na_value=np.nan)
            standard &= np.isnan(numbers) | (numbers == value)
    return pd.Series(standard, index=runs.index) | (runs["method"] == "fullft")


def check_runs(runs: pd.DataFrame) -> None:
    """Check that the runs table is valid and that no arm has two runs with the same LR and seed.

    Raises:
        UserError: An arm has two runs with the same LR and seed, or `check_table` raises.
    """
    check_table(runs)
    check_arms(runs)


def check_arms(runs: pd.DataFrame) -> None:
    """Check that no arm has two runs with the same LR and seed.

    Raises:
        UserError: An arm has two such runs.
    """
    if runs.empty:
        return
    runs = with_arm_columns(runs)
    lr, seed = runs["lr"].to_numpy(object), runs["seed"].to_numpy(object)
    for arm, places in arm_places(runs):
        times = Counter(zip(lr[places], seed[places], strict=True))
        same = [place for place in places if times[lr[place], seed[place]] > 1]
        if not same:
            continue
        of_arm = runs.iloc[same]
        raise UserError(
            f"{arm['model']}/{arm['dataset']} {arm_label(arm)}: runs {listed(of_arm['run_id'])} have the same LR and "
            "seed, so they differ in something that is not part of an arm; analyse them separately"
        )


def each_arm(table: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return each arm (values of the ARM columns, None for null) with its rows; FullFT comes first, then by rank."""
    table = with_arm_columns(table)
    return [(arm, table.iloc[places]) for arm, places in arm_places(table)]


def arm_places(table: pd.DataFrame) -> list[tuple[dict[str, Any], list[int]]]:
    """Return each arm with the positions of its rows, in the order of `each_arm`.

    This is several times as fast as a groupby over so many columns, of which several are text.

    Args:
        table: all columns ARM.
    """
    columns = [_values(table[name], name in _INTEGERS) for name in ARM]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, key in enumerate(zip(*columns, strict=True)):
        groups.setdefault(key, []).append(place)
    arms = [(dict(zip(ARM, key, strict=True)), places) for key, places in groups.items()]
    return sorted(arms, key=lambda pair: _order(pair[0]))


def first_seed(of_arm: pd.DataFrame) -> pd.DataFrame:
    """Return an arm's runs with its lowest seed, which make its LR grid; other seeds repeat the best LR."""
    grid: pd.DataFrame = of_arm[of_arm["seed"] == of_arm["seed"].min()]
    return grid


def rows_of(
    runs: pd.DataFrame, arm: Mapping[str, Any] | pd.Series, columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the rows that agree with an arm in `columns`, by default all ARM columns they have; null equals null."""
    chosen = pd.Series(True, index=runs.index)
    for name in columns or [name for name in ARM if name in runs]:
        value = arm.get(name)
        same = runs[name].isna() if value is None or pd.isna(value) else runs[name].eq(value).fillna(False)
        chosen &= same.astype(bool)
    return runs[chosen]


def arm_table(rows: Sequence[Mapping[Any, Any]], columns: list[str]) -> pd.DataFrame:
    """Return a table of rows with the columns ARM and `columns`, which it has even if there are no rows."""
    frame = pd.DataFrame(rows, columns=[*ARM, *columns])
    return frame.astype(dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys([*STANDARD, "eps"], "float64"))


def _values(column: pd.Series[Any], whole: bool) -> list[Any]:
    """Return a column's values as plain Python, None for null; one with nulls may hold its whole numbers as floats."""
    values = column.to_numpy(object)
    if whole:
        return [None if null else int(value) for value, null in zip(values, pd.isna(values), strict=True)]
    return [None if null else value for value, null in zip(values, pd.isna(values), strict=True)]


def _order(arm: dict[str, Any]) -> tuple[Any, ...]:
    numbers = (arm[name] or 0 for name in (*STANDARD, "eps"))
    return (
        str(arm["model"]),
        str(arm["dataset"]),
        arm["batch_size"] or 0,
        arm["steps"] or 0,
        arm["method"] != "fullft",
        arm["rank"] or 0,
        str(arm["placement"]),
        *numbers,
    )
