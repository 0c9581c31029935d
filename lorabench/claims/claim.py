"""The type of a claim, the evidence that it is judged on, and how the findings on several comparisons become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import pandas as pd

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import kept
from lorabench.analysis.comparison import Comparison, Judging, Task, comparisons
from lorabench.analysis.estimate import Estimate
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, together, with_parts, without
from lorabench.analysis.rules import DECIDED, Problem, Remedy, Verdict
from lorabench.utils.formats import with_interval

Kind = Literal["empirical", "derivation", "count", "opinion", "prediction", "own prediction"]
"""How the paper supports a statement (docs/verdicts.md); an `own prediction` is this project's, and not the paper's."""


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

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The comparisons of the arms that LoRA is judged by, one per model, dataset, batch size and length."""
        return comparisons(self.runs[judged_arms(self.runs)], self.curves, self.judging)


@dataclass(frozen=True)
class Condition:
    """What the runs must be like for a claim to be about them, such as their length."""

    text: str
    """The end of a sentence that starts with "needs"."""
    instead: Callable[[Evidence], str | None]
    """Returns None if the evidence meets the condition, and otherwise a text on what it has instead."""
    presets: tuple[str, ...]
    """The shipped presets whose runs meet it."""


def condition(text: str, *presets: str) -> Callable[[Callable[[Evidence], str | None]], Condition]:
    """Return a decorator that makes a condition of the function that says what the evidence has instead."""
    return lambda instead: Condition(text, kept(instead), presets)


@dataclass(frozen=True)
class Claim:
    """A testable statement of the paper."""

    id: str
    statement: str
    criterion: str
    """The conditions for the verdict `confirmed`, and for `contradicted`."""
    needs: str
    """The runs or tables that the criterion needs, for the reason of a claim that is not tested."""
    experiments: tuple[str, ...]
    """The experiments whose runs the claim is judged on; in a table without the column `experiments`, all runs."""
    judge: Judge
    over: Callable[[Evidence], Iterable[tuple[str, Any]]] | None = None
    """Returns what the claim is judged on, each part after its name; the worst finding decides. None: the evidence."""
    paper_value: str = "no number"
    """The paper's number for the estimate, or its statement without a number."""
    kind: Kind = "empirical"
    figure: str = "text"
    """The number of the paper's figure, or several with commas, or `text`; `own` if the paper has no such statement."""
    unit: str = "nats per token"
    """The unit of the estimate."""
    columns: tuple[str, ...] = ()
    """The columns of `runs` that the claim needs beyond those of every claim on its task (see `NEEDED_BY`)."""
    task: Task = "sft"
    """The task whose runs the claim is judged on."""
    conditions: tuple[Condition, ...] = ()
    """What the runs must be like for the claim to be about them; without it the verdict is `setting not met`."""
    fact: str = ""
    """The fact that the claim states; claims with the same fact are one in the headline."""
    core: bool = False
    """Whether the paper's main conclusions rest on this claim."""


Judge = Callable[[Any], Finding | Iterable[Finding]]
"""Judges one part of the evidence: it returns a finding, or yields one for each number that it looks at."""

Function = TypeVar("Function", bound=Judge)

JUDGES: dict[str, dict[str, dict[str, Any]]] = {}
"""What `claim` declared: fields of `Claim` by module and by claim id."""


def claim(
    claim_id: str,
    over: Callable[[Evidence], Iterable[tuple[str, Any]]] | None = None,
    columns: tuple[str, ...] = (),
    conditions: tuple[Condition, ...] = (),
) -> Callable[[Function], Function]:
    """Return a decorator that declares the decorated function to be the judge of a claim, whose texts stand in a YAML
    file beside the function's module (see `texts`)."""

    def declare(judge: Function) -> Function:
        fields = {"judge": judge, "over": over, "columns": columns, "conditions": conditions}
        JUDGES.setdefault(judge.__module__, {})[claim_id] = fields
        return judge

    return declare


def judge_part(judge: Judge, part: Any) -> Finding:
    """Return the finding of a judge on a part of the evidence; of several that it yields, the worst decides."""
    try:
        judged = judge(part)
        return judged if isinstance(judged, Finding) else together(list(judged))
    except UnjudgedError as unjudged:
        return unjudged.finding


def judge_each(named: Iterable[tuple[str, Any]], judge: Judge) -> Finding:
    """Return the finding on several things that decides; its reason gives all, after their names and verdicts."""
    by_name = [(name, judge_part(judge, part)) for name, part in named]
    unjudged_if(not by_name, "no such runs")
    findings = [
        replace(judged, reason=f"{name}{f' ({judged.verdict})' if len(by_name) > 1 else ''}: {judged.reason}")
        for name, judged in by_name
    ]
    return with_parts(together(findings), findings)


def unjudged_if(condition: object, reason: str, verdict: Verdict = "not tested", remedy: Remedy | None = None) -> None:
    """Raise UnjudgedError with a verdict and its reason if a condition holds."""
    if condition:
        raise UnjudgedError(verdict, reason, remedy)


def doubted(judged: Finding, problems: Sequence[Problem], verdicts: Sequence[Verdict] = DECIDED) -> Finding:
    """Return the finding with further problems, which make some verdicts inconclusive; if `contradicted` is none of
    these, a finding with another verdict keeps its reason."""
    if not problems:
        return judged
    opened = without(judged, *verdicts)
    if judged.verdict in verdicts:
        opened = replace(opened, remedy=next((problem.remedy for problem in problems if problem.remedy), None))
    elif "contradicted" not in verdicts:
        return opened
    return replace(opened, reason="; ".join([judged.reason, *(problem.text for problem in problems)]))


def named_problems(problems: Iterable[Problem], name: str, where: str = "") -> list[Problem]:
    """Return problems after the name of what they are about; `where` follows the texts of their remedies."""
    return [
        Problem(f"{name} {problem.text}", problem.remedy and replace(problem.remedy, text=problem.remedy.text + where))
        for problem in problems
    ]


def few_seeds(seeds: int, what: str = "paired seeds", needed: int = MIN_SEEDS) -> list[Problem]:
    """Return the problem that there are fewer seeds than a verdict needs, if so."""
    remedy = Remedy(f"{needed} seeds (now {seeds})", seeds=needed)
    return [Problem(f"{seeds} {what}, {needed} needed", remedy)] if seeds < needed else []


def number(estimate: Estimate, digits: int = 2, sign: str = "") -> str:
    """Format a number with its 95% interval; with the sign `+`, the number is never without a sign."""
    return with_interval(estimate.value, *estimate.interval(), digits, sign)
