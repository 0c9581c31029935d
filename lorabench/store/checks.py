"""Check that tables can be trusted before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd

from lorabench.config.fields import METHOD_NAMES
from lorabench.errors import UserError

SMALLEST, MAX_NUMBER, MAX_LR = 1e-30, 1e15, 1e6
"""Numbers of a table that are smaller, larger, or larger learning rates are mistakes, and make sums overflow."""


# Losses are comparable only for the same text, tokenization and base model, and scores only for the same sampler: each
# of these columns must have one value per combination of the columns that follow it.
_ONE_PER = {
    "runs": {
        "tokenizer_sha256": ("tokenizers", ["model", "dataset"]),
        "template_sha256": ("chat templates", ["model", "dataset"]),
        "dataset_sha256": ("datasets under one name", ["dataset"]),
        "model_sha256": ("models under one name", ["model"]),
    },
    "scores": {"sampler": ("samplers", ["model"])},
}


def is_rl(runs: pd.DataFrame) -> pd.Series[bool]:
    """Return which runs are reinforcement learning; a run without a task counts as supervised fine-tuning."""
    if "task" not in runs:
        return pd.Series(False, index=runs.index)
    return runs["task"].isin(["rl"])


def check_table(runs: pd.DataFrame) -> None:
    """Raise UserError unless the runs table is valid; columns that it lacks are not checked.

    Each run has an id of its own, allowed values, and, if it is finished, finite losses, or in RL rewards between 0 and
    1; and the runs are comparable (see `check_comparable`).
    """
    if runs.empty:
        return
    if "run_id" in runs:
        if runs["run_id"].isna().any():
            raise UserError(f"the runs table has {int(runs['run_id'].isna().sum())} runs without a run_id")
        twice = runs.loc[runs["run_id"].duplicated(), "run_id"]
        if len(twice):
            raise UserError(f"the runs table has these run_ids more than once: {listed(twice)}")

    def require(name: str, right: pd.Series[bool], allowed: str) -> None:
        if name in runs:
            refuse_rows(runs, ~right, "run_id", name, allowed)

    up_to = f"up to {MAX_NUMBER:g}"
    counts = ["batch_size", "steps", "n_seeds", "trainable_params", "base_params", "hidden_size", "train_tokens"]
    ranges = {
        **dict.fromkeys(counts, (1, f"whole numbers from 1 {up_to}")),
        **dict.fromkeys(["alpha", "init_a", "lr_ratio"], (SMALLEST, f"numbers above 0, {up_to}")),
        **dict.fromkeys(["final_test_nll_sd", "final_train_nll", "eps"], (0, f"numbers from 0 {up_to}")),
    }
    losses = ["final_valid_nll", "final_test_nll"]
    rewards = ["base_reward", "final_valid_reward", "final_reward", "best_reward"]
    # A column that is lacking is null in what the rules of the others say of it.
    numbers = ["rank", "lr", *ranges, *losses, *rewards]
    table = runs.reindex(columns=["model", "dataset", "task", "method", "status", "seed", *numbers])
    known = table.notna()
    number = pd.DataFrame({name: table[name].to_numpy(float, na_value=np.nan) for name in numbers}, index=runs.index)
    adapters = [method for method in METHOD_NAMES if method != "fullft"]
    lora, fullft, rl = table["method"].isin(adapters), table["method"].isin(["fullft"]), is_rl(table)
    done, stopped = table["status"].isin(["done"]), rl & table["status"].isin(["unrewarded", "collapsed"])
    ranked = (lora & number["rank"].ge(1)) | (fullft & ~known["rank"]) | ("method" not in runs)
    ended = done | stopped | table["status"].isin(["diverged"])
    require("task", ~known["task"] | table["task"].isin(["sft", "rl"]), "sft, rl")
    require("method", lora | fullft, ", ".join(METHOD_NAMES))
    require("status", ended, "done, diverged, and in RL unrewarded and collapsed")
    require("rank", ranked, "whole numbers from 1 up for lora, none for fullft")
    require("lr", number["lr"].between(SMALLEST, MAX_LR), f"numbers above 0, from {SMALLEST:g} to {MAX_LR:g}")
    require("seed", known["seed"], "whole numbers")
    for name in ("model", "dataset"):
        require(name, known[name] & table[name].ne(""), "a name")
    for name, (low, allowed) in ranges.items():
        require(name, ~known[name] | number[name].between(low, MAX_NUMBER), allowed)
    for name in losses:
        allowed = f"a finite number where status is done, from 0 {up_to}"
        require(name, rl | ~done | number[name].between(0, MAX_NUMBER), allowed)
    for name in rewards:
        share, needed = number[name].between(0, 1), (rl & done) | stopped
        if name.startswith("final"):
            require(name, share | (~known[name] & ~needed), "a share of 0 to 1 where RL finished")
        else:
            require(name, share | ~known[name], "a share of 0 to 1")
    check_comparable(runs, "runs")


def check_comparable(table: pd.DataFrame, rows: Literal["runs", "scores"]) -> None:
    """Raise UserError if the rows of `runs`, or the scores of `evals`, can't be compared with one another.

    One name stands for several tokenizers, chat templates, datasets or models; or some scores of a model and of what
    was trained from it were computed with another sampler than others.
    """
    for column, (what, per) in _ONE_PER[rows].items():
        if column not in table or not set(per) <= set(table.columns):
            continue
        for names, group in table.groupby(per):
            values = group[column].dropna().unique()
            if column == "dataset_sha256" and "test_data" in group and group["test_data"].notna().all():
                # Batches of one design have test examples of their own, which the hash of a dataset's file covers.
                by_test_data = group.groupby("test_data")[column].nunique()
                values = group["test_data"].str.partition("@")[0].unique() if by_test_data.max() == 1 else values
            if len(values) > 1:
                raise UserError(
                    f"{rows} of {'/'.join(map(str, names))} have different {what}, {listed(values)}: not comparable"
                )


def refuse_rows(table: pd.DataFrame, wrong: pd.Series[bool], named_by: str, column: str, allowed: str) -> None:
    """Raise UserError if a row is wrong in a column, and name the first by its value of `named_by`."""
    if not wrong.any():
        return
    [row] = table[wrong].head(1).to_dict("records")
    value = "missing" if pd.isna(row[column]) else repr(row[column])
    raise UserError(f"{named_by} {row.get(named_by)}: {column} = {value}; allowed: {allowed}")


def check_curves(curves: pd.DataFrame) -> None:
    """Raise UserError if the curves table lacks a column, has a negative step or NLL, or two values of one point."""
    if curves.columns.empty:
        return
    point = ["run_id", "step", "split", "metric"]
    if missing := [name for name in (*point, "value") if name not in curves]:
        raise UserError(f"the curves table has no column {', '.join(missing)}")
    step, nll = curves["step"], curves["value"].where(curves["metric"].eq("nll"))
    refuse_rows(curves, ~step.ge(0).fillna(False).astype(bool), "run_id", "step", "whole numbers from 0 up")
    refuse_rows(curves, nll.lt(0), "run_id", "value", "an NLL from 0 up")
    twice = curves.duplicated(point)
    if twice.any():
        [row] = curves[twice].head(1).to_dict("records")
        point_name = f"{row['split']} {row['metric']} of step {row['step']}"
        raise UserError(f"the curves table has {point_name} of run_id {row['run_id']} more than once")


def check_test_losses(losses: pd.DataFrame) -> None:
    """Raise UserError if the table `test_losses` lacks a column or a value, or has an infinite or negative number."""
    needed = ["run_id", "example", "loss", "tokens"]
    if missing := [name for name in needed if name not in losses]:
        raise UserError(f"the test_losses table has no column {', '.join(missing)}")
    refuse_rows(losses, losses["run_id"].isna(), "run_id", "run_id", "an id")
    for name, low in (("example", 0), ("loss", -MAX_NUMBER), ("tokens", 0)):
        right = losses[name].astype(float).between(low, MAX_NUMBER)
        refuse_rows(losses, ~right, "run_id", name, f"numbers from {low:g} to {MAX_NUMBER:g}")


def listed(values: Iterable[object]) -> str:
    """Return the distinct values as text, sorted and separated by commas."""
    return ", ".join(sorted(str(value) for value in set(values)))
