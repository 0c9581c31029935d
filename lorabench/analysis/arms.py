"""Arms: grouping, selecting, naming and checking the runs of a table.

An arm is what one LR sweep varies over: a method (FullFT, or LoRA of one rank, placement and parametrization) on one
model and dataset, at one batch size and number of steps. Its runs differ in learning rate and seed only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorabench.errors import UserError

STANDARD = {"alpha": 32.0, "init_a": 1.0, "lr_ratio": 1.0}
"""The paper's parametrization of LoRA: alpha, A's initial scale in units of 1/sqrt(d_in), LR of B over LR of A."""

ARM = ["model", "dataset", "method", "rank", "placement", "batch_size", "steps", *STANDARD, "eps"]
"""Columns whose values identify an arm. FullFT has null for rank, placement and the parametrization of LoRA."""

OPTIONAL = ["steps", *STANDARD, "eps"]
"""Columns of ARM that a table may lack; all of its runs then count as having the same value."""

_LOSSES = ["final_valid_nll", "final_test_nll"]

_INTEGERS = ("rank", "batch_size", "steps")

# Losses are comparable only for the same text, tokenization and base model: each of these hashes must have one value
# per combination of the columns that follow it.
_ONE_PER = {
    "tokenizer_sha256": ("tokenizers", ["model", "dataset"]),
    "template_sha256": ("chat templates", ["model", "dataset"]),
    "dataset_sha256": ("datasets under one name", ["dataset"]),
    "model_sha256": ("models under one name", ["model"]),
}


def with_arm_columns(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with every optional column of ARM; a column that it lacked is null."""
    return runs.reindex(columns=[*runs.columns, *(name for name in OPTIONAL if name not in runs)])


def arm_label(arm: Mapping[str, Any] | pd.Series) -> str:
    """Return the short name of an arm: `FullFT`, `LoRA r8`, `LoRA r8 attn alpha 8`; standard values are omitted."""
    if arm["method"] == "fullft":
        return "FullFT"
    words = [f"LoRA r{int(arm['rank'])}"]
    if not pd.isna(arm["placement"]) and arm["placement"] != "all":
        words.append(str(arm["placement"]))
    for name, words_for in (("alpha", "alpha {:g}"), ("init_a", "init x{:g}"), ("lr_ratio", "LR_B/LR_A {:g}")):
        value = arm.get(name)
        if value is not None and not pd.isna(value) and value != STANDARD[name]:
            words.append(words_for.format(value))
    return " ".join(words)


def is_standard(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are FullFT, or LoRA in the paper's parametrization; null counts as standard."""
    standard = pd.Series(True, index=runs.index)
    for name, value in STANDARD.items():
        if name in runs:
            standard &= (runs[name].isna() | runs[name].eq(value)).astype(bool)
    return standard | (runs["method"] == "fullft")


def is_rl(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are reinforcement learning; a run without a task counts as supervised fine-tuning."""
    if "task" not in runs:
        return pd.Series(False, index=runs.index)
    return runs["task"].eq("rl").fillna(False).astype(bool)


def check_table(runs: pd.DataFrame) -> None:
    """Check that the runs table is valid. Columns that it lacks are not checked.

    Raises:
        UserError: A run_id is missing or appears twice; a task, method, status, rank, LR or seed has a value that is
            not allowed; a finished run has no finite losses, or in RL no rewards between 0 and 1; or one name stands
            for several tokenizers, chat templates, datasets or models.
    """
    if runs.empty:
        return
    if "run_id" in runs:
        if runs["run_id"].isna().any():
            raise UserError(f"the runs table has {int(runs['run_id'].isna().sum())} runs without a run_id")
        twice = runs.loc[runs["run_id"].duplicated(), "run_id"]
        if len(twice):
            raise UserError(f"the runs table has these run_ids more than once: {_listed(twice)}")
    _check_values(runs)
    for column, (what, per) in _ONE_PER.items():
        if column not in runs or not set(per) <= set(runs.columns):
            continue
        for names, group in runs.groupby(per):
            hashes = group[column].dropna().unique()
            if len(hashes) > 1:
                raise UserError(
                    f"runs of {'/'.join(map(str, names))} have different {what}, {_listed(hashes)}: not comparable"
                )


def _check_values(runs: pd.DataFrame) -> None:
    rewards = ["base_reward", "final_valid_reward", "final_reward", "best_reward"]
    column = runs.reindex(columns=["task", "method", "status", "rank", "lr", "seed", *_LOSSES, *rewards])
    lora, fullft = column["method"].eq("lora"), column["method"].eq("fullft")
    done, diverged, unrewarded = (column["status"].eq(name) for name in ("done", "diverged", "unrewarded"))
    rl = is_rl(runs)
    finished_rl = rl & (done | unrewarded)
    ranked = (lora & column["rank"].ge(1)) | (fullft & column["rank"].isna()) | ("method" not in runs)
    rules = [
        ("task", column["task"].isna() | column["task"].isin(["sft", "rl"]), "sft, rl"),
        ("method", lora | fullft, "fullft, lora"),
        ("status", done | diverged | (rl & unrewarded), "done, diverged, and unrewarded in RL"),
        ("rank", ranked, "whole numbers from 1 up for lora, none for fullft"),
        ("lr", _finite(column["lr"]) & column["lr"].gt(0), "numbers above 0"),
        ("seed", column["seed"].notna(), "whole numbers"),
    ]
    for name in _LOSSES:
        rules.append((name, rl | ~done | _finite(column[name]), "a finite number where status is done"))
    for name in rewards:
        needed = finished_rl if name.startswith("final") else pd.Series(False, index=runs.index)
        share = column[name].between(0, 1).fillna(False) | (column[name].isna() & ~needed)
        rules.append((name, share, "a share of 0 to 1" + (" where RL finished" if name.startswith("final") else "")))
    for name, right, allowed in rules:
        if name in runs:
            refuse(runs, ~right.fillna(False).astype(bool), "run_id", name, allowed)


def _finite(numbers: pd.Series[Any]) -> pd.Series[bool]:
    return pd.Series(np.isfinite(numbers.to_numpy(float, na_value=np.nan)), index=numbers.index)


def refuse(table: pd.DataFrame, wrong: pd.Series[bool], named_by: str, column: str, allowed: str) -> None:
    """Report the first wrong row of a table, if there is any, with its value and what is allowed.

    Args:
        table: the table, with `column` and, if possible, `named_by`.
        wrong: which rows of the table are wrong.
        named_by: the column whose value names a row in the message, such as run_id.
        column: the column with the wrong value.
        allowed: the allowed values, in words.

    Raises:
        UserError: At least one row is wrong.
    """
    if not wrong.any():
        return
    [row] = table[wrong].head(1).to_dict("records")
    value = "missing" if pd.isna(row[column]) else repr(row[column])
    raise UserError(f"{named_by} {row.get(named_by)}: {column} = {value}; allowed: {allowed}")


def check_curves(curves: pd.DataFrame) -> None:
    """Check that the curves table can be read. It may have curves of runs that the runs table lacks.

    Raises:
        UserError: A column is missing, or a run has two values of one metric at one step.
    """
    if curves.columns.empty:
        return
    point = ["run_id", "step", "split", "metric"]
    if missing := [name for name in (*point, "value") if name not in curves]:
        raise UserError(f"the curves table has no column {', '.join(missing)}")
    twice = curves.duplicated(point)
    if twice.any():
        [row] = curves[twice].head(1).to_dict("records")
        point_name = f"{row['split']} {row['metric']} of step {row['step']}"
        raise UserError(f"the curves table has {point_name} of run_id {row['run_id']} more than once")


def check_runs(runs: pd.DataFrame) -> None:
    """Check that the runs table is valid and that no arm has two runs with the same LR and seed.

    Raises:
        UserError: An arm has two runs with the same LR and seed, or `check_table` raises.
    """
    check_table(runs)
    if runs.empty:
        return
    runs = with_arm_columns(runs)
    same = runs[runs.duplicated([*ARM, "lr", "seed"], keep=False)]
    if len(same):
        arm, of_arm = each_arm(same)[0]
        raise UserError(
            f"{arm['model']}/{arm['dataset']} {arm_label(arm)}: runs {_listed(of_arm['run_id'])} have the same LR and "
            "seed, so they differ in something that is not part of an arm; analyse them separately"
        )


def each_arm(table: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return each arm (values of the ARM columns, None for null) with its rows; FullFT comes first, then by rank."""
    if table.empty:
        return []
    table = with_arm_columns(table)
    groups = [
        (dict(zip(ARM, map(_value, ARM, key), strict=True)), group)
        for key, group in table.groupby(ARM, dropna=False, sort=False)
    ]
    return sorted(groups, key=lambda pair: _order(pair[0]))


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
    return frame.astype(dict.fromkeys(_INTEGERS, "Int64"))


def _value(column: str, value: Any) -> Any:
    """Return a column's value as plain Python; a column with nulls may hold its integers as floats."""
    if pd.isna(value):
        return None
    return int(value) if column in _INTEGERS else value


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


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(str(value) for value in set(values)))
