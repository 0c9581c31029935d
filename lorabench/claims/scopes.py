"""Scopes of claims: functions that choose the comparisons on which a claim is judged."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from lorabench.analysis.comparison import Comparison
from lorabench.analysis.finding import UnjudgedError
from lorabench.analysis.memorisation import is_memorisation

Scoped = tuple[Comparison, str]
"""A comparison that a claim is judged on, and a note for the finding's reason that says why it was chosen."""

Scope = Callable[[list[Comparison]], list[Scoped]]
"""A function that chooses, from all comparisons in the tables, the comparisons that a claim is judged on."""

FULL_STEPS = 1000
"""The number of steps of a run from which claims on whole runs are judged: the paper's runs take thousands."""


def every_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose all comparisons."""
    return [(comparison, "") for comparison in comparisons]


def smallest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose, for each model, the dataset with the fewest train tokens."""
    return _by_size(comparisons, "train_tokens", lambda runs: -float(runs["train_tokens"].max()), "fewest tokens")


def _by_size(
    comparisons: list[Comparison], column: str, size: Callable[[pd.DataFrame], float], why: str
) -> list[Scoped]:
    by_model: dict[str, dict[str, list[Comparison]]] = {}
    for comparison in comparisons:
        first = comparison.runs.iloc[0]
        by_model.setdefault(first["model"], {}).setdefault(first["dataset"], []).append(comparison)
    chosen: list[Scoped] = []
    for model, datasets in by_model.items():
        if len(datasets) == 1:
            [picked] = datasets.values()
            note = f" (the only dataset of {model})"
        elif any(column not in c.runs or c.runs[column].isna().all() for group in datasets.values() for c in group):
            raise UnjudgedError("not tested", f"the runs table has no {column}, by which {model}'s dataset is chosen")
        else:
            picked = max(datasets.values(), key=lambda group: size(pd.concat([each.runs for each in group])))
            note = f" ({why} of {len(datasets)} datasets)"
        chosen += [(comparison, note) for comparison in picked]
    return chosen


def every_longest(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose, for each model and dataset, the comparison with the most steps."""
    return every_dataset(longest_runs(comparisons))


def longest_run(comparisons: list[Comparison]) -> list[Scoped]:
    """Choose, for each model, the dataset with the most examples seen, and its comparison with the most steps."""

    def examples(runs: pd.DataFrame) -> float:
        return float((runs["steps"] * runs["batch_size"]).max())

    return _by_size(longest_runs(comparisons), "steps", examples, "most examples")


def longest_runs(comparisons: list[Comparison]) -> list[Comparison]:
    """Return, for each model and dataset, the comparison with the most steps; shorter runs are its beginning."""
    longest: dict[tuple[str, str], Comparison] = {}
    for comparison in comparisons:
        first = comparison.runs.iloc[0]
        known = longest.setdefault((first["model"], first["dataset"]), comparison)
        if comparison.runs["steps"].fillna(0).max() > known.runs["steps"].fillna(0).max():
            longest[first["model"], first["dataset"]] = comparison
    return list(longest.values())


def full_runs(scope: Scope) -> Scope:
    """Return the scope without comparisons of fewer than `FULL_STEPS` steps, if there are longer ones."""

    def chosen(comparisons: list[Comparison]) -> list[Scoped]:
        full = [comparison for comparison in comparisons if (comparison.runs["steps"] >= FULL_STEPS).any()]
        return scope(full or comparisons)

    return chosen


def learning(scope: Scope) -> Scope:
    """Return the scope without the datasets of random facts, from which a model learns nothing general."""
    return lambda comparisons: scope(without_facts(comparisons))


def without_facts(comparisons: list[Comparison]) -> list[Comparison]:
    """Return the comparisons whose dataset does not hold random facts."""
    return [comparison for comparison in comparisons if not is_memorisation(comparison.runs).any()]
