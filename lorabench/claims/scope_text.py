"""The scope of a verdict in words: the size of the models, the length of the runs and the data behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from lorabench.tables.checks import is_rl
from lorabench.utils.formats import count, parameters


def scope_text(runs: pd.DataFrame, run_ids: Sequence[str]) -> str | None:
    """Return the scope of the given runs, such as `0.83M parameters, 50 steps, worked`; None if the table lacks them.

    Args:
        runs: column run_id, and optionally base_params, model, steps, dataset, task. The names of the models stand in
            for their numbers of parameters.
        run_ids: the runs behind a verdict.
    """
    names = [name for name in ("base_params", "model", "steps", "dataset", "task") if name in runs]
    chosen = runs.loc[runs["run_id"].isin(run_ids), names] if "run_id" in runs else runs.iloc[:0]
    if chosen.empty:
        return None
    known = chosen.dropna(axis="columns", how="all")
    words = []
    if "base_params" in known:
        words.append(f"{_range(known['base_params'], parameters)} parameters")
    elif "model" in known:
        words.append(_names(known["model"]))
    if "steps" in known:
        words.append(f"{_range(known['steps'], count)} steps")
    if "dataset" in known:
        words.append(("RL on " if bool(is_rl(chosen).all()) else "") + _names(known["dataset"]))
    return ", ".join(words) or None


def _names(values: pd.Series[Any]) -> str:
    return ", ".join(sorted(set(values.dropna().astype(str))))


def _range(values: pd.Series[Any], text: Callable[[float], str]) -> str:
    low, high = (text(float(value)) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
