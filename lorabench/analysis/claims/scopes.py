"""Scopes: which of the comparisons in the tables a claim is judged on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pandas as pd

from lorabench.analysis.claims.evidence import Evidence, judge_each
from lorabench.analysis.comparison import Comparison
from lorabench.analysis.finding import (
    Finding,
    UnjudgedError,
)
from lorabench.analysis.memorisation import is_memorisation
from lorabench.analysis.parametrization import (
    with_scales,
)

Scoped = tuple[Comparison, str]
"""A comparison that a claim is about, and why that one."""


Scope = Callable[[list[Comparison]], list[Scoped]]


def every_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """All that the tables hold."""
    return [(comparison, "") for comparison in comparisons]


def smallest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the fewest train tokens."""
    return _by_size(comparisons, "train_tokens", lambda runs: float(runs["train_tokens"].max()), -1, "fewest tokens")


def longest_dataset(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the most examples seen (steps times batch size)."""
    return _by_size(
        comparisons, "steps", lambda runs: float((runs["steps"] * runs["batch_size"]).max()), 1, "most examples"
    )


def _by_size(
    comparisons: list[Comparison], column: str, size: Callable[[pd.DataFrame], float], sign: int, why: str
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
            sizes = {dataset: sign * max(size(c.runs) for c in group) for dataset, group in datasets.items()}
            picked = datasets[max(sizes, key=lambda dataset: sizes[dataset])]
            note = f" ({why} of {len(datasets)} datasets)"
        chosen += [(comparison, note) for comparison in picked]
    return chosen


def every_longest(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model and dataset, its greatest length."""
    return every_dataset(longest_runs(comparisons))


def longest_run(comparisons: list[Comparison]) -> list[Scoped]:
    """Per model, the dataset with the most examples, at its greatest length."""
    return longest_dataset(longest_runs(comparisons))


def longest_runs(comparisons: list[Comparison]) -> list[Comparison]:
    """Per model and dataset the comparison with the most steps: shorter ones are its beginning."""
    longest: dict[tuple[str, str], Comparison] = {}
    for one in comparisons:
        first = one.runs.iloc[0]
        known = longest.setdefault((first["model"], first["dataset"]), one)
        if one.runs["steps"].fillna(0).max() > known.runs["steps"].fillna(0).max():
            longest[first["model"], first["dataset"]] = one
    return list(longest.values())


def learning(scope: Scope) -> Scope:
    """A scope without the datasets of random facts, from which nothing general is learned."""
    return lambda comparisons: scope(without_facts(comparisons))


def without_facts(comparisons: list[Comparison]) -> list[Comparison]:
    return [one for one in comparisons if not is_memorisation(one.runs).any()]


def on_lora(judge: Callable[[pd.DataFrame, pd.DataFrame], Finding]) -> Callable[[Evidence], Finding]:
    """Judge the LoRA runs of each model and dataset, whatever their parametrisation; the worst finding decides."""

    return lambda evidence: judge_each(
        (f"{model}/{dataset}", partial(judge, runs, evidence.curves))
        for (model, dataset), runs in with_scales(evidence.runs).groupby(["model", "dataset"])
    )
