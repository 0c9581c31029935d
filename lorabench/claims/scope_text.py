"""The scope of a verdict in words: the size of the models, the length of the runs and the data behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorabench.store.checks import is_rl
from lorabench.utils.formats import count, parameters


def scope_text(runs: pd.DataFrame, run_ids: Sequence[str]) -> str | None:
    """Return the scope of the given runs, such as `0.83M parameters, 50 steps, worked`; None if the table lacks them.

    Args:
        runs: column run_id, and optionally base_params, model, steps, dataset, task. The names of the models stand in
            for their numbers of parameters.
        run_ids: the runs behind a verdict.
    """
    behind = set(run_ids)
    places = [run_id in behind for run_id in runs["run_id"].to_numpy(object)] if "run_id" in runs else []
    if not any(places):
        return None

    def known(name: str) -> set[Any]:
        values = runs[name].to_numpy(object)[places] if name in runs else np.array([], object)
        return set(values[~pd.isna(values)].tolist())

    parameter_counts, models, steps, datasets = map(known, ("base_params", "model", "steps", "dataset"))
    words = []
    if parameter_counts:
        words.append(f"{_range(parameter_counts, parameters)} parameters")
    elif models:
        words.append(", ".join(sorted(map(str, models))))
    if steps:
        words.append(f"{_range(steps, count)} steps")
    if datasets:
        all_rl = bool(is_rl(runs).to_numpy()[places].all())
        words.append(("RL on " if all_rl else "") + ", ".join(sorted(map(str, datasets))))
    return ", ".join(words) or None


def _range(values: set[Any], text: Callable[[float], str]) -> str:
    low, high = (text(float(value)) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
