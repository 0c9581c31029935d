"""Models whose LR was swept with FullFT and with LoRA on the same data, and the law of their optimal LRs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.estimate import Estimate, combined, student, unknown
from lorabench.analysis.lr_law import ArmOptimum, LrLaw, fit_lr_law, is_determined, lineage
from lorabench.analysis.rules import Problem

METHODS = ("fullft", "lora")
"""The methods that are swept on each model."""


@dataclass(frozen=True)
class SweptModel:
    """The LR sweeps of FullFT and of LoRA on one model; LoRA at the rank chosen for the model's group."""

    comparison: Comparison
    fullft: Arm
    lora: Arm
    lineage: str
    """The family in which the model counts for the law."""
    hidden_size: int

    @property
    def name(self) -> str:
        """The name of the model."""
        return str(self.fullft["model"])

    @cached_property
    def base(self) -> tuple[object, ...]:
        """What models share that were post-trained from one base: family, hidden size and number of parameters."""
        sizes = self.comparison.runs.reindex(columns=["base_params"])["base_params"].dropna()
        return self.lineage, self.hidden_size, int(sizes.iloc[0]) if len(sizes) else self.name

    @cached_property
    def log_ratio(self) -> Estimate:
        """The natural logarithm of the optimal LR of LoRA over that of FullFT."""
        return self.comparison.fit.log_ratio(arm_label(self.lora), arm_label(self.fullft))

    @cached_property
    def problems(self) -> list[Problem]:
        """What speaks against a verdict on the optimal LRs."""
        return self.comparison.problems([self.lora, self.fullft], resolved=True)

    def arm(self, method: str) -> Arm:
        """Return the arm of a method, `lora` or `fullft`."""
        return self.lora if method == "lora" else self.fullft

    def log_optimum(self, method: str) -> Estimate:
        """Return the natural logarithm of the optimal LR of a method; unknown if its runs give no fit."""
        return self.comparison.fit.optima.get(arm_label(self.arm(method)), unknown())

    def arm_optimum(self, method: str) -> ArmOptimum | None:
        """Return the optimum of a method as the law is fitted to it; None if its runs give no parabola with one."""
        label, fit = arm_label(self.arm(method)), self.comparison.fit
        if label not in fit.minima or not fit.curvature[label] > 0 or not fit.minima[label].value > 0:
            return None
        steepness = fit.curvature[label] / fit.minima[label].value
        return ArmOptimum(self.lineage, self.hidden_size, method, fit.optima[label].value, steepness)


def swept_models(comparisons: Sequence[Comparison]) -> list[list[SweptModel]]:
    """Return the models with both methods, in groups of one dataset, batch size and length.

    LoRA is taken at the highest rank above 1 that all models of a group have, or else at each model's highest.
    """
    by_data: dict[tuple[object, ...], list[Comparison]] = {}
    for comparison in comparisons:
        known = comparison.runs["family"].notna() & comparison.runs["hidden_size"].notna()
        if comparison.fullft and comparison.highest and known.any():
            key = tuple(comparison.fullft[name] for name in ("dataset", "batch_size", "steps"))
            by_data.setdefault(key, []).append(comparison)
    groups = []
    for group in by_data.values():
        shared = set.intersection(*({rank for rank in comparison.lora if rank > 1} for comparison in group))
        models = []
        for comparison in group:
            lora = comparison.lora[max(shared)] if shared else comparison.highest
            fullft, lora = require(("FullFT", comparison.fullft), ("LoRA", lora))
            family, hidden_size = (comparison.runs[name].dropna().iloc[0] for name in ("family", "hidden_size"))
            models.append(SweptModel(comparison, fullft, lora, lineage(str(family)), int(hidden_size)))
        groups.append(sorted(models, key=lambda model: (model.lineage, model.hidden_size, model.name)))
    return groups


def by_base(models: Sequence[SweptModel]) -> list[list[SweptModel]]:
    """Group models by their base.

    A base and the models that were post-trained from it have much in common, so they are not independent: a number of
    a base is the mean over its models (see `mean_of`), and it is bases that scatter.
    """
    groups: dict[tuple[object, ...], list[SweptModel]] = {}
    for model in models:
        groups.setdefault(model.base, []).append(model)
    return list(groups.values())


def mean_of(numbers: Sequence[Estimate]) -> Estimate:
    """Return the mean of several estimates, whose errors are drawn together."""
    return numbers[0] if len(numbers) == 1 else combined(lambda *values: np.mean(values, axis=0), *numbers)


def run_ids(models: Sequence[SweptModel]) -> list[str]:
    """Return the ids of the runs of several models."""
    return [run_id for model in models for run_id in model.comparison.run_ids([model.fullft, model.lora])]


def fitted_law(models: Sequence[SweptModel]) -> LrLaw | None:
    """Fit the law to the optima of models; the result is None where they do not determine it."""
    optima = [optimum for model in models for method in METHODS if (optimum := model.arm_optimum(method))]
    return fit_lr_law(optima) if is_determined(optima) else None


def slope_over_models(x: Sequence[float], y: Sequence[Estimate], groups: Sequence[Hashable], name: str) -> Estimate:
    """Estimate the slope of numbers of models on a property of the models, with an intercept for each group.

    The error is that of the numbers, drawn together, or else that from their scatter around the line, where this is
    larger; then `n_seeds` is 0, since it is models that are too few.

    Args:
        x: the property of each model, such as ln of its hidden size.
        y: the numbers, such as ln of an optimal LR.
        groups: a label for each number.
        name: names the slope, for draws.

    Returns:
        The slope; it is unknown if no group has two values of x, or if the error of a number is not known.
    """
    places = np.asarray(x, float)
    labels = np.array([hash(group) for group in groups])
    own = labels[:, None] == labels[None, :]
    centred = places - own @ places / own.sum(1)
    squares = float((centred**2).sum())
    if not squares > 1e-12:
        return unknown()
    weights = centred / squares
    slope = combined(lambda *numbers: np.tensordot(weights, np.array(numbers), 1), *y)
    values = np.array([estimate.value for estimate in y])
    residual = values - own @ values / own.sum(1) - slope.value * centred
    dof = len(y) - len(set(groups)) - 1
    if not slope.known or dof < 1:
        return slope
    scatter = float((residual**2).sum()) / dof
    explained = float(np.mean([estimate.seed_error**2 + estimate.example_error**2 for estimate in y]))
    if scatter <= explained:
        return slope
    return student(slope.value, math.sqrt(scatter / squares), dof, name)
