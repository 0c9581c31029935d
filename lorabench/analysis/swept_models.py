"""Models whose LR was swept with FullFT and with LoRA on the same data, and the law of their optimal LRs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import Arm, Comparison, require
from lorabench.analysis.lr_law import LrLaw, LrProblem, fit_lr_law, is_determined, lineage
from lorabench.analysis.lr_ratio import LrRatio, lr_ratio
from lorabench.analysis.optimum import LrGrid, lr_grid


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
    def ratio(self) -> LrRatio:
        """The optimal LR of LoRA over that of FullFT."""
        return lr_ratio(self.comparison, self.lora, self.fullft)

    def arm(self, method: str) -> Arm:
        """Return the arm of a method, `lora` or `fullft`."""
        return self.lora if method == "lora" else self.fullft

    def grid(self, method: str) -> LrGrid:
        """Return the losses of a method by LR."""
        return lr_grid(self.comparison.rows[arm_label(self.arm(method))])


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


def run_ids(models: Sequence[SweptModel]) -> list[str]:
    """Return the ids of the runs of several models."""
    return [run_id for model in models for run_id in model.comparison.of([model.fullft, model.lora])["run_id"]]


def fitted_law(models: Sequence[SweptModel]) -> LrLaw | None:
    """Fit the law to the validation losses of models; the result is None where they do not determine it."""
    problems = []
    for model in models:
        for method in ("fullft", "lora"):
            grid = model.grid(method)
            if np.isfinite(grid.validation).any() and len(grid.lr) > 1:
                problems.append(LrProblem(model.lineage, model.hidden_size, method, grid.lr, grid.validation))
    return fit_lr_law(problems) if is_determined(problems) else None
