"""The rules that the claims across several models share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from lorabench.analysis.finding import Finding, UnjudgedError
from lorabench.analysis.rules import Problem, Remedy
from lorabench.analysis.swept_models import SweptModel, swept_models
from lorabench.claims.evidence import Evidence, judge_each

MIN_MODELS = 4
"""The number of models that a verdict across models needs."""

EXPERIMENTS = ("lr_law", "rank")
"""The experiments whose runs these claims read."""

COLUMNS = ("family", "hidden_size")
"""The further columns of `runs` that these claims need."""

MODELS = (
    f"FullFT and LoRA swept on at least {MIN_MODELS} models with the same data, batch size and length; seeds around "
    "the optima"
)
"""The runs that these claims need."""


def across_models(judge: Callable[[list[SweptModel]], Finding]) -> Callable[[Evidence], Finding]:
    """Return a judge of each group of models with one dataset, batch size and length; the worst group decides.

    Groups of fewer than MIN_MODELS models are left out, unless no group is larger: then the largest are judged.
    """

    def judge_all(evidence: Evidence) -> Finding:
        groups = swept_models(evidence.comparisons)
        largest = max(map(len, groups), default=0)
        if largest < 2:
            raise UnjudgedError("not tested", "no two models with FullFT and LoRA swept on the same data")
        judged = [models for models in groups if len(models) >= min(MIN_MODELS, largest)]
        return judge_each((_data_of(models), partial(judge, models)) for models in judged)

    return judge_all


def _data_of(models: list[SweptModel]) -> str:
    first = models[0].fullft
    length = f", {first['steps']} steps" if first["steps"] is not None else ""
    return f"{len(models)} models on {first['dataset']}, batch {first['batch_size']}{length}"


def too_few(number: int, needed: int, what: str = "models") -> list[Problem]:
    """Return the problem that there are fewer models than a verdict needs, if so."""
    if number >= needed:
        return []
    return [Problem(f"{number} {what}, {needed} needed", Remedy(f"{needed} {what} (now {number})"))]


def of_models(models: list[SweptModel]) -> list[Problem]:
    """Return what speaks against a verdict on the optimal LRs of models, with the names of the models."""
    return [
        Problem(
            f"{model.name}: {each.text}",
            each.remedy and replace(each.remedy, text=f"{each.remedy.text} on {model.name}"),
        )
        for model in models
        for each in model.problems
    ]


def or_more_models(judged: Finding) -> Finding:
    """Return a finding with the remedy of more models, if it is inconclusive and no number of seeds decides it."""
    if judged.verdict != "inconclusive" or judged.remedy:
        return judged
    return replace(judged, remedy=Remedy("more models, since these scatter more than the errors of their optima"))
