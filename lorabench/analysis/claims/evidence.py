"""What a claim is judged on: the tidy tables of its experiments, and the comparisons they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol, TypeVar

import pandas as pd

from lorabench.analysis.arms import is_standard
from lorabench.analysis.comparison import Comparison, comparisons
from lorabench.analysis.finding import (
    Finding,
    UnjudgedError,
    together,
)

SWEEP = "FullFT and LoRA on all layers, each with an LR grid whose best LR is not at its edge"
"""What most claims need, in words."""


@dataclass(frozen=True)
class Evidence:
    """The tidy tables as a claim sees them; a table that is not there is empty."""

    runs: pd.DataFrame
    """Those of its task and its experiments."""
    curves: pd.DataFrame
    """Of those runs."""
    compute: pd.DataFrame
    counts: pd.DataFrame
    every_run: pd.DataFrame = field(default_factory=pd.DataFrame)
    """All of the table, for a claim that sets one task beside the other."""

    @cached_property
    def standard(self) -> pd.DataFrame:
        """FullFT, and LoRA in the paper's parametrisation, whatever its placement."""
        return self.runs[is_standard(self.runs)]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """What can be compared: the standard runs of one model, dataset, batch size and length."""
        return comparisons(self.standard, self.curves)


class Labelled(Protocol):
    """What a claim is judged on by itself: a comparison, or several that belong together."""

    @property
    def label(self) -> str: ...


Judged = TypeVar("Judged", bound=Labelled)


def over(
    scope: Callable[[list[Comparison]], list[tuple[Judged, str]]], judge: Callable[[Judged], Finding]
) -> Callable[[Evidence], Finding]:
    """Judge each in scope by itself; the worst finding decides, and the reason names all."""

    return lambda evidence: judge_each(
        (f"{judged.label}{note}", partial(judge, judged)) for judged, note in scope(evidence.comparisons)
    )


def judge_each(named: Iterable[tuple[str, Callable[[], Finding]]]) -> Finding:
    """The finding that decides over several, each with its name in the reason."""
    found = []
    for name, judge in named:
        try:
            one = judge()
        except UnjudgedError as unjudged:
            one = unjudged.finding
        found.append(replace(one, reason=f"{name}: {one.reason}"))
    if not found:
        raise UnjudgedError("not tested", "no such runs")
    return together(found)
