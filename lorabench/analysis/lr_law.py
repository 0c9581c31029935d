"""The paper's law of the optimal LR, which depends on the method and the model's family and hidden size.

LR = base * M * (2000 / hidden size) ** exponent, where M is 1 for FullFT

All constants are in the authors' later code, `get_lr` of `hyperparam_utils` in thinking-machines-lab/tinker-cookbook.
The paper fits the law by the summed regret, the rise of the loss at the predicted LR as a share of the lowest loss.
Here losses are parabolas in ln LR, so the fit is weighted least squares, and its constants are linear in the optima.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison
from lorabench.analysis.estimate import Estimate, combined, student, unknown
from lorabench.analysis.rules import Problem

PIVOT = 2000.0
"""Hidden size at which the law gives the base LR."""


@dataclass(frozen=True)
class LrLaw:
    """The constants of the law: the optimal LR of FullFT at hidden size PIVOT, M, which is the optimal LR of LoRA over
    that of FullFT, and the exponent of each lineage."""

    base: float
    multiplier: float
    exponents: Mapping[str, float]


PUBLISHED = LrLaw(base=5e-5, multiplier=10.0, exponents={"llama": 0.781, "qwen": 0.0775})
"""The constants in the authors' code, for supervised fine-tuning at batch size 128."""


class ArmOptimum(NamedTuple):
    """The fitted optimum of one arm."""

    lineage: str
    hidden_size: int
    method: str
    log_lr: float
    """Natural logarithm of the optimal LR."""
    steepness: float
    """The curvature of the loss over its lowest value: the regret at a distance of 1 in ln LR."""


def lineage(family: str) -> str:
    """Return the lineage of a transformers model type: `qwen` for qwen2, qwen3, qwen3_moe; others are their own."""
    return next((name for name in PUBLISHED.exponents if family.lower().startswith(name)), family.lower())


def predict_lr(law: LrLaw, family: str, hidden_size: float, method: str) -> float:
    """Return the LR that a law predicts for a method, `fullft` or `lora`; NaN for a family without an exponent."""
    exponent = law.exponents.get(lineage(family), math.nan)
    return float(law.base * (law.multiplier if method == "lora" else 1.0) * (PIVOT / hidden_size) ** exponent)


def fit_lr_law(optima: Sequence[ArmOptimum]) -> LrLaw | None:
    """Fit the law whose predictions have the lowest summed regret, the criterion of the paper's fit, if determined."""
    lineages, design = _design(optima)
    from_optima = _constants_from(design, optima)
    if from_optima is None:
        return None
    log_base, log_multiplier, *exponents = (from_optima @ [optimum.log_lr for optimum in optima]).tolist()
    return LrLaw(math.exp(log_base), math.exp(log_multiplier), dict(zip(lineages, exponents, strict=True)))


def prediction_errors(optima: Sequence[ArmOptimum], left_out: Sequence[Hashable] | None = None) -> np.ndarray:
    """Return the matrix, (n, n), that maps the ln LR of optima to errors of predictions (ln predicted - ln optimal) by
    the law fitted to all optima, or with a label for each in `left_out`, to those with other labels. A row is NaN where
    the law is not determined."""
    (_, design), n = _design(optima), len(optima)
    labels = [None] * n if left_out is None else list(left_out)
    errors = np.full((n, n), math.nan)
    for label in dict.fromkeys(labels):
        predicted = [row for row in range(n) if labels[row] == label]
        fitted = [row for row in range(n) if left_out is None or labels[row] != label]
        from_optima = _constants_from(design[fitted], [optima[row] for row in fitted])
        if from_optima is not None:
            errors[predicted] = -np.eye(n)[predicted]
            errors[np.ix_(predicted, fitted)] += design[predicted] @ from_optima
    return errors


def _design(optima: Sequence[ArmOptimum]) -> tuple[list[str], np.ndarray]:
    """Return the lineages, and the design matrix of the law in ln LR: ln base, ln M and each lineage's exponent."""
    lineages = sorted({optimum.lineage for optimum in optima})
    constant, lora = np.ones(len(optima)), [optimum.method == "lora" for optimum in optima]
    sizes = np.log([PIVOT / optimum.hidden_size for optimum in optima])
    of_lineages = [sizes * [optimum.lineage == name for optimum in optima] for name in lineages]
    return lineages, np.column_stack([constant, lora, *of_lineages])


def _constants_from(design: np.ndarray, optima: Sequence[ArmOptimum]) -> np.ndarray | None:
    """Return the matrix that maps ln LRs to the law's constants; None if they are not determined."""
    if not len(optima) or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    weights = np.sqrt([optimum.steepness for optimum in optima])
    return np.asarray(np.linalg.pinv(design * weights[:, None]) * weights)


METHODS = ("fullft", "lora")


@dataclass(frozen=True)
class SweptMethods:
    """The LR sweeps of FullFT and of LoRA in one comparison."""

    comparison: Comparison
    fullft: Arm
    lora: Arm

    @cached_property
    def log_ratio(self) -> Estimate:
        """The natural logarithm of the optimal LR of LoRA over that of FullFT."""
        return self.comparison.fit.log_ratio(arm_label(self.lora), arm_label(self.fullft))

    @cached_property
    def problems(self) -> list[Problem]:
        """The reasons against a verdict on the optimal LRs."""
        return self.comparison.problems([self.lora, self.fullft], resolved=True)

    def arm(self, method: str) -> Arm:
        """Return the arm of a method, `lora` or `fullft`."""
        return self.lora if method == "lora" else self.fullft

    def log_optimum(self, method: str) -> Estimate:
        """Return the natural logarithm of the optimal LR of a method; unknown if its runs give no fit."""
        return self.comparison.fit.optima.get(arm_label(self.arm(method)), unknown())


@dataclass(frozen=True)
class SweptModel(SweptMethods):
    """The sweeps on one model, with LoRA at the rank chosen for the model's group."""

    lineage: str
    """The family in which the model counts for the law."""
    hidden_size: int

    @property
    def name(self) -> str:
        return str(self.fullft["model"])

    @cached_property
    def base(self) -> tuple[object, ...]:
        """Family, hidden size and number of parameters, which models share that were post-trained from one base."""
        sizes = self.comparison.runs.reindex(columns=["base_params"])["base_params"].dropna()
        return self.lineage, self.hidden_size, int(sizes.iloc[0]) if len(sizes) else self.name

    def arm_optimum(self, method: str) -> ArmOptimum | None:
        """Return the optimum of a method as the law is fitted to it; None if its runs give no parabola with one."""
        label, fit = arm_label(self.arm(method)), self.comparison.fit
        if label not in fit.minima or not fit.curvature[label] > 0 or not fit.minima[label].value > 0:
            return None
        steepness = fit.curvature[label] / fit.minima[label].value
        return ArmOptimum(self.lineage, self.hidden_size, method, fit.optima[label].value, steepness)


def swept_models(comparisons: Sequence[Comparison]) -> list[list[SweptModel]]:
    """Return the models with both methods, in groups of one dataset, batch size and length; LoRA is at the highest rank
    above 1 that all models of a group have, or else at each model's highest."""
    by_data: dict[tuple[object, ...], list[SweptModel]] = {}
    for comparison in comparisons:
        known = comparison.runs[["family", "hidden_size"]].dropna()
        fullft, lora = comparison.fullft, comparison.highest
        if fullft and lora and len(known):
            family, hidden_size = known.to_numpy()[0]
            model = SweptModel(comparison, fullft, lora, lineage(str(family)), int(hidden_size))
            by_data.setdefault(tuple(fullft[name] for name in ("dataset", "batch_size", "steps")), []).append(model)
    groups = []
    for models in by_data.values():
        shared = set.intersection(*(set(model.comparison.lora) for model in models)) - {1}
        if shared:
            models = [replace(model, lora=model.comparison.lora[max(shared)]) for model in models]
        groups.append(sorted(models, key=lambda model: (model.lineage, model.hidden_size, model.name)))
    return groups


def by_base(models: Sequence[SweptModel]) -> list[list[SweptModel]]:
    """Group models by their base, since models that were post-trained from one are not independent: bases scatter."""
    return [[model for model in models if model.base == base] for base in dict.fromkeys(each.base for each in models)]


def mean_of(numbers: Sequence[Estimate]) -> Estimate:
    """Return the mean of several estimates, whose errors are drawn together."""
    return numbers[0] if len(numbers) == 1 else combined(lambda *values: np.mean(values, axis=0), *numbers)


def run_ids(models: Sequence[SweptModel]) -> list[str]:
    """Return the ids of the runs of several models."""
    return [run_id for model in models for run_id in model.comparison.run_ids([model.fullft, model.lora])]


def slope_over_models(x: Sequence[float], y: Sequence[Estimate], groups: Sequence[Hashable], name: str) -> Estimate:
    """Estimate the slope of numbers y of models on a property x of the models, with an intercept for each group. The
    error is that of the numbers, drawn together, or that from their scatter around the line, where this is larger; then
    `n_seeds` is 0, since it is models that are too few. The slope is unknown if no group has two values of x."""
    places, values = np.asarray(x, float), np.array([estimate.value for estimate in y])
    own = np.array([[group == other for other in groups] for group in groups])
    means = own / own.sum(1)[:, None]
    centred = places - means @ places
    squares = float((centred**2).sum())
    if not squares > 1e-12:
        return unknown()
    slope = combined(lambda *numbers: np.tensordot(centred / squares, np.array(numbers), 1), *y)
    dof = len(y) - len(set(groups)) - 1
    if not slope.known or dof < 1:
        return slope
    scatter = float(((values - means @ values - slope.value * centred) ** 2).sum()) / dof
    explained = float(np.mean([estimate.seed_error**2 + estimate.example_error**2 for estimate in y]))
    return slope if scatter <= explained else student(slope.value, math.sqrt(scatter / squares), dof, name)
