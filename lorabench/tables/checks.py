"""Check that tables can be trusted before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from lorabench.errors import UserError

_LOSSES = ["final_valid_nll", "final_test_nll"]

# Losses are comparable only for the same text, tokenization and base model: each of these hashes must have one value
# per combination of the columns that follow it.
_ONE_PER = {
    "tokenizer_sha256": ("tokenizers", ["model", "dataset"]),
    "template_sha256": ("chat templates", ["model", "dataset"]),
    "dataset_sha256": ("datasets under one name", ["dataset"]),
    "model_sha256": ("models under one name", ["model"]),
}


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
            raise UserError(f"the runs table has these run_ids more than once: {listed(twice)}")
    _check_values(runs)
    for column, (what, per) in _ONE_PER.items():
        if column not in runs or not set(per) <= set(runs.columns):
            continue
        for names, group in runs.groupby(per):
            hashes = group[column].dropna().unique()
            if len(hashes) > 1:
                raise UserError(
                    f"runs of {'/'.join(map(str, names))} have different {what}, {listed(hashes)}: not comparable"
                )


def _check_values(runs: pd.DataFrame) -> None:
    rewards = ["base_reward", "final_valid_reward", "final_reward", "best_reward"]
    several = ["n_seeds", "final_test_nll_sd"]
    column = runs.reindex(columns=["task", "method", "status", "rank", "lr", "seed", *several, *_LOSSES, *rewards])
    lora, fullft = column["method"].eq("lora"), column["method"].eq("fullft")
    done, diverged, unrewarded = (column["status"].eq(name) for name in ("done", "diverged", "unrewarded"))
    rl = is_rl(runs)
    finished_rl = rl & (done | unrewarded)
    deviation = column["final_test_nll_sd"]
    ranked = (lora & column["rank"].ge(1)) | (fullft & column["rank"].isna()) | ("method" not in runs)
    rules = [
        ("task", column["task"].isna() | column["task"].isin(["sft", "rl"]), "sft, rl"),
        ("method", lora | fullft, "fullft, lora"),
        ("status", done | diverged | (rl & unrewarded), "done, diverged, and unrewarded in RL"),
        ("rank", ranked, "whole numbers from 1 up for lora, none for fullft"),
        ("lr", _finite(column["lr"]) & column["lr"].gt(0), "numbers above 0"),
        ("seed", column["seed"].notna(), "whole numbers"),
        ("n_seeds", column["n_seeds"].isna() | column["n_seeds"].ge(1), "whole numbers from 1 up"),
        ("final_test_nll_sd", deviation.isna() | (_finite(deviation) & deviation.ge(0)), "numbers from 0 up"),
    ]
    for name in _LOSSES:
        rules.append((name, rl | ~done | _finite(column[name]), "a finite number where status is done"))
    for name in rewards:
        needed = finished_rl if name.startswith("final") else pd.Series(False, index=runs.index)
        share = column[name].between(0, 1).fillna(False) | (column[name].isna() & ~needed)
        rules.append((name, share, "a share of 0 to 1" + (" where RL finished" if name.startswith("final") else "")))
    for name, right, allowed in rules:
        if name in runs:
            refuse_rows(runs, ~right.fillna(False).astype(bool), "run_id", name, allowed)


def _finite(numbers: pd.Series[Any]) -> pd.Series[bool]:
    return pd.Series(np.isfinite(numbers.to_numpy(float, na_value=np.nan)), index=numbers.index)


def refuse_rows(table: pd.DataFrame, wrong: pd.Series[bool], named_by: str, column: str, allowed: str) -> None:
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


def listed(values: Iterable[object]) -> str:
    """Return the distinct values in words, sorted and separated by commas."""
    return ", ".join(sorted(str(value) for value in set(values)))
