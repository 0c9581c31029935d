"""Judging several comparisons by one claim, and what speaks against a verdict in the words that claims share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import pandas as pd

from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.finding import MIN_SEEDS, Finding, UnjudgedError, together, without
from lorabench.analysis.invariances import with_scales
from lorabench.analysis.rules import Margin, Problem, Remedy
from lorabench.claims.claim import Evidence

Judged = TypeVar("Judged")


def over(
    scope: Callable[[list[Comparison]], list[tuple[Comparison, str]]], judge: Callable[[Comparison], Finding]
) -> Callable[[Evidence], Finding]:
    """Return a function that judges each comparison in a scope by itself; the worst finding decides.

    Args:
        scope: chooses what is judged from all comparisons; each choice has a note for the reason.
        judge: judges one comparison.
    """

    def judge_all(evidence: Evidence) -> Finding:
        chosen = scope(evidence.comparisons)
        return judge_each(((f"{comparison.label}{note}", comparison) for comparison, note in chosen), judge)

    return judge_all


def on_lora(judge: Callable[[pd.DataFrame, pd.DataFrame], Finding]) -> Callable[[Evidence], Finding]:
    """Return a function that judges the LoRA runs of each model and dataset; the worst finding decides.

    The runs may have any parametrization.

    Args:
        judge: given the LoRA runs (with the columns of `with_scales`) and the table `curves`.
    """

    def judge_all(evidence: Evidence) -> Finding:
        groups = with_scales(evidence.runs).groupby(["model", "dataset"])
        named = ((f"{model}/{dataset}", runs) for (model, dataset), runs in groups)
        return judge_each(named, lambda runs: judge(runs, evidence.curves))

    return judge_all


def judge_each(named: Iterable[tuple[str, Judged]], judge: Callable[[Judged], Finding]) -> Finding:
    """Judge several things and return the finding that decides; its reason gives all reasons, each after its name.

    Raises:
        UnjudgedError: there is nothing to judge.
    """
    findings = []
    for name, judged in named:
        try:
            finding = judge(judged)
        except UnjudgedError as unjudged:
            finding = unjudged.finding
        findings.append(replace(finding, reason=f"{name}: {finding.reason}"))
    if not findings:
        raise UnjudgedError("not tested", "no such runs")
    return together(findings)


def highest_and_full(comparison: Comparison) -> list[Arm]:
    """Return LoRA at the highest rank above 1, and FullFT.

    Raises:
        UnjudgedError: an arm is missing.
    """
    return require(("LoRA above rank 1", comparison.highest), ("FullFT", comparison.fullft))


def doubted(judged: Finding, problems: Sequence[Problem]) -> Finding:
    """Return the finding with further problems; with any, a verdict of confirmed or contradicted is inconclusive."""
    if not problems:
        return judged
    reason = "; ".join([judged.reason, *(problem.text for problem in problems)])
    opened = without(replace(judged, reason=reason), "confirmed", "contradicted")
    if judged.verdict not in ("confirmed", "contradicted"):
        return opened
    return replace(opened, remedy=next((problem.remedy for problem in problems if problem.remedy), None))


def unconfirmed(judged: Finding, problems: Sequence[Problem]) -> Finding:
    """Return the finding, which problems keep from being confirmed; a finding with another verdict stays as it is."""
    if not problems:
        return judged
    if judged.verdict == "confirmed":
        reason = "; ".join([judged.reason, *(problem.text for problem in problems)])
        judged = replace(judged, reason=reason, remedy=problems[0].remedy)
    return without(judged, "confirmed")


def named_problems(problems: Iterable[Problem], name: str, where: str = "") -> list[Problem]:
    """Return problems after the name of what they are about; `where` follows the texts of their remedies."""
    return [
        Problem(f"{name} {problem.text}", problem.remedy and replace(problem.remedy, text=problem.remedy.text + where))
        for problem in problems
    ]


def few_seeds(seeds: int, what: str = "paired seeds", needed: int = MIN_SEEDS) -> list[Problem]:
    """Return the problem that there are fewer seeds than a verdict needs, if so."""
    if seeds >= needed:
        return []
    return [Problem(f"{seeds} {what}, {needed} needed", Remedy(f"{needed} seeds (now {seeds})", seeds=needed))]


def margin_problems(margin: Margin) -> list[Problem]:
    """Return a problem if a margin is not known."""
    if margin.problem:
        return [Problem(margin.problem)]
    return [] if math.isfinite(margin.value) else [Problem("the margin is not known")]
