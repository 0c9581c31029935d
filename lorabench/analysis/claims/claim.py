"""What a claim is: a statement of the paper, a criterion, and the function that judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorabench.analysis.claims.evidence import Evidence
from lorabench.analysis.comparison import Task
from lorabench.analysis.finding import Finding

Kind = Literal["empirical", "theory", "opinion", "prediction"]
"""Kinds E, T, O, X of the project's notes: shown in a figure, derived, said in passing, left untested by the paper."""


@dataclass(frozen=True)
class Claim:
    """A testable statement of the paper."""

    id: str
    kind: Kind
    statement: str
    figure: str
    """The paper's figure by number, or `text`; several with commas."""
    criterion: str
    needs: str
    paper_value: str
    unit: str
    experiments: tuple[str, ...]
    """Experiments whose runs it reads; in a table without the column `experiments`, all runs."""
    judge: Callable[[Evidence], Finding]
    columns: tuple[str, ...] = ()
    """Columns of `runs` that it needs beyond those of every claim on its task."""
    task: Task = "sft"
    """The task whose runs it reads."""
    core: bool = False
    """Whether the paper's main conclusions rest on this claim: the README shows the core claims first."""


def untestable(reason: str) -> Callable[[Evidence], Finding]:
    """The judge of a claim that no preset tests, and why."""
    return lambda evidence: Finding("not tested", reason)
