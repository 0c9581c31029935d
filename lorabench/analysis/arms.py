"""Arms, the units that are compared: grouping, selecting, naming and checking the runs of a table, and their losses.

An arm is everything that an LR sweep leaves fixed: a method (FullFT, or LoRA of one rank, placement and
parametrization) on one model and dataset, at one batch size and number of steps. Its runs differ in LR and seed only.

Estimators pick an LR by `validation_loss` and report `test_loss`, which tables on disk do not have; lower is better.
They are the NLL in nats per scored token (`with_losses`), in RL the error rate (`rewards.with_error_rates`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pandas as pd

from lorabench.config.fields import METHOD_NAMES
from lorabench.errors import UserError
from lorabench.store.checks import listed
from lorabench.store.io import list_of_words

ALPHA = 32.0
"""The paper's alpha."""

STANDARD = {"alpha": ALPHA, "init_a": 1.0, "lr_ratio": 1.0}
"""The paper's parametrization of LoRA: alpha, A's initial scale in units of 1/sqrt(d_in), LR of B over LR of A."""

ARM = ["model", "dataset", "method", "rank", "placement", "batch_size", "steps", *STANDARD, "eps"]
"""Columns whose values identify an arm. FullFT has null for rank, placement and the parametrization of LoRA."""

OPTIONAL = ["steps", *STANDARD, "eps"]
"""Columns of ARM that a table may lack; all of its runs then count as having the same value."""

_INTEGERS = ("rank", "batch_size", "steps")

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def with_arm_columns(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with every optional column of ARM; a column that it lacked is null."""
    return runs.reindex(columns=list(dict.fromkeys([*runs.columns, *OPTIONAL])))


def with_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with `validation_loss` and `test_loss`; a column that they lack is taken from the final NLLs."""
    columns = {"validation_loss": "final_valid_nll", "test_loss": "final_test_nll"}
    return runs.assign(**{loss: runs[nll] for loss, nll in columns.items() if loss not in runs and nll in runs})


def arm_label(arm: Mapping[str, Any] | pd.Series) -> str:
    """Return the short name of an arm: `FullFT`, `LoRA r8`, `LoRA r8 attn alpha 8`; standard values are omitted."""
    if arm["method"] == "fullft":
        return "FullFT"
    words = [f"{METHOD_NAMES[arm['method']]} r{int(arm['rank'])}"]
    if not pd.isna(arm["placement"]) and arm["placement"] != "all":
        words.append(str(arm["placement"]))
    for name, template in (("alpha", "alpha {:g}"), ("init_a", "init x{:g}"), ("lr_ratio", "LR_B/LR_A {:g}")):
        value = arm.get(name)
        if value is not None and not pd.isna(value) and value != STANDARD[name]:
            words.append(template.format(value))
    return " ".join(words)


def kept(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Keep in the first argument, as its `made`, what a function makes of it and of arms, labels or other texts."""

    @wraps(function)
    def once(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        made: dict[Any, Made] = vars(args[0]).setdefault("made", {})
        key = (function, *(arm_label(each) if isinstance(each, dict) else each for each in args[1:]), *kwargs.items())
        if key not in made:
            made[key] = function(*args, **kwargs)
        return made[key]

    return once


def arm_labels(rows: pd.DataFrame) -> list[str]:
    """Return the short name of the arm of each row, as `arm_label` does, but fast."""
    names = [name for name in ARM if name in rows]
    return [arm_label(dict(zip(names, row, strict=True))) for row in zip(*(rows[name] for name in names), strict=True)]


def is_standard(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are FullFT, or LoRA in the paper's parametrization; null counts as standard."""
    numbers = runs.reindex(columns=list(STANDARD)).astype(float)
    standard = (numbers.isna() | numbers.eq(pd.Series(STANDARD))).all(axis=1) & (runs["method"] == "lora")
    return standard | (runs["method"] == "fullft")


def in_experiments(runs: pd.DataFrame, names: Sequence[str]) -> pd.Series[bool]:
    """Return which runs belong to one of the experiments; a run that names no experiment belongs to all."""
    if "experiments" not in runs:
        return pd.Series(True, index=runs.index)
    words = runs["experiments"].map(list_of_words)
    return words.map(lambda own: not own or not set(names).isdisjoint(own)).astype(bool)


def check_runs(runs: pd.DataFrame) -> None:
    """Raise a UserError if an arm has two runs with the same LR and seed."""
    repeated = runs.duplicated([*(name for name in ARM if name in runs), "lr", "seed"], keep=False)
    for arm, same in each_arm(runs[repeated]) if repeated.any() else ():
        raise UserError(
            f"{arm['model']}/{arm['dataset']} {arm_label(arm)}: runs {listed(same['run_id'])} have the same LR and "
            "seed, so they differ in something that is not part of an arm; analyse them separately"
        )


def each_arm(table: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return each arm (values of the ARM columns, None for null) with its rows; FullFT comes first, then by rank."""
    table = with_arm_columns(table)
    # A groupby over so many columns, some of which are text, takes several times as long.
    groups: dict[tuple[Any, ...], list[int]] = {}
    columns = []
    for name in ARM:
        values = table[name].to_numpy(object)
        # A column with nulls may hold its whole numbers as floats.
        convert = int if name in _INTEGERS else lambda value: value
        columns.append([None if null else convert(value) for value, null in zip(values, pd.isna(values), strict=True)])
    for place, key in enumerate(zip(*columns, strict=True)):
        groups.setdefault(key, []).append(place)

    def order(pair: tuple[dict[str, Any], pd.DataFrame]) -> tuple[Any, ...]:
        arm = pair[0]
        data = (str(arm["model"]), str(arm["dataset"]), arm["batch_size"] or 0, arm["steps"] or 0)
        method = (arm["method"] != "fullft", arm["rank"] or 0, str(arm["placement"]))
        return *data, *method, *(arm[name] or 0 for name in (*STANDARD, "eps"))

    arms = [(dict(zip(ARM, key, strict=True)), table.iloc[places]) for key, places in groups.items()]
    return sorted(arms, key=order)


def arm_table(rows: Sequence[Mapping[Any, Any]], columns: list[str]) -> pd.DataFrame:
    """Return a table of rows with the columns ARM and `columns`, which it has even if there are no rows."""
    frame = pd.DataFrame(rows, columns=[*ARM, *columns])
    return frame.astype(dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys([*STANDARD, "eps"], "float64"))
