"""The evidence that a claim is judged on: the tables of its experiments, and the comparisons in them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol, TypeVar

import pandas as pd

from lorabench.analysis.arms import is_standard
from lorabench.analysis.comparison import Comparison, Judging, comparisons
from lorabench.analysis.finding import Finding, UnjudgedError, together
from lorabench.analysis.lr_ratio import MeasuredRatio, measured_ratios

SWEEP = "FullFT and LoRA on all layers, each with an LR grid whose best LR is not at its edge"
"""The runs that most claims need."""


@dataclass(frozen=True)
class Evidence:
    """The tidy tables that a claim is judged on; a table that does not exist is empty."""

    runs: pd.DataFrame
    """The rows of the table `runs` that belong to the claim's task and experiments."""
    curves: pd.DataFrame
    """The learning curves of these runs."""
    compute: pd.DataFrame
    """The table `compute`: FLOPs, time and memory of training steps."""
    counts: pd.DataFrame
    """The table `counts`: parameter counts of LoRA on large models."""
    every_run: pd.DataFrame = field(default_factory=pd.DataFrame)
    """The whole table `runs`, for a claim that compares RL with supervised training."""
    judging: Judging = field(default_factory=Judging)
    """Margins, losses by test example, and seed noise from elsewhere."""
    rewarded: dict[str, list[Comparison]] = field(default_factory=dict, repr=False)
    """The comparisons of RL on error rates that claims have asked for, by the column of test accuracies; they share
    their fits."""

    unmet: dict[Hashable, str | None] = field(default_factory=dict, repr=False)
    """What these runs have instead of a condition of claims, by condition; None where they meet it."""

    @cached_property
    def standard(self) -> pd.DataFrame:
        """The runs of FullFT, and the runs of LoRA in the paper's parametrization on any layers."""
        return self.runs[is_standard(self.runs)]

    @cached_property
    def lr_ratios(self) -> list[MeasuredRatio]:
        """The conditions in which the ratio of LoRA's to FullFT's optimal LR is measured, with any alpha."""
        return measured_ratios(self.runs, self.curves, self.judging)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The comparisons of the standard runs, one per model, dataset, batch size and length."""
        return comparisons(self.standard, self.curves, self.judging, checked=True)


class Labelled(Protocol):
    """A comparison, or several comparisons that are judged together."""

    @property
    def label(self) -> str: ...


Judged = TypeVar("Judged", bound=Labelled)


def over(
    scope: Callable[[list[Comparison]], list[tuple[Judged, str]]], judge: Callable[[Judged], Finding]
) -> Callable[[Evidence], Finding]:
    """Return a function that judges each comparison in a scope by itself; the worst finding decides.

    Args:
        scope: chooses what is judged from all comparisons; each choice has a note for the reason.
        judge: judges one choice of the scope.
    """

    return lambda evidence: judge_each(
        (f"{judged.label}{note}", partial(judge, judged)) for judged, note in scope(evidence.comparisons)
    )


def judge_each(named: Iterable[tuple[str, Callable[[], Finding]]]) -> Finding:
    """Run several judges and return the finding that decides; its reason gives all reasons, each after its name.

    Raises:
        UnjudgedError: there is nothing to judge.
    """
    findings = []
    for name, judge in named:
        try:
            judged = judge()
        except UnjudgedError as unjudged:
            judged = unjudged.finding
        findings.append(replace(judged, reason=f"{name}: {judged.reason}"))
    if not findings:
        raise UnjudgedError("not tested", "no such runs")
    return together(findings)
