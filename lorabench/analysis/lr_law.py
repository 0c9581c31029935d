"""The paper's LR law: the optimal LR from a model's family and hidden size, and the method.

    LR = base * M * (2000 / hidden size) ** exponent        M is 1 for FullFT

The paper prints the form without a base LR; all constants are in the authors' later code (paper notes, 2.5). The law
does not know of rank, dataset, batch size or length, so constants belong to the data they were fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize

PIVOT = 2000.0
"""Hidden size at which the law gives the base LR."""


@dataclass(frozen=True)
class LrLaw:
    """The law's constants."""

    base: float
    """Optimal LR of FullFT at the pivot's hidden size."""
    multiplier: float
    """M: optimal LR of LoRA over that of FullFT."""
    exponents: Mapping[str, float]
    """By lineage."""


PUBLISHED = LrLaw(base=5e-5, multiplier=10.0, exponents={"llama": 0.781, "qwen": 0.0775})
"""The constants in the authors' code, for supervised fine-tuning at batch size 128."""


class LrProblem(NamedTuple):
    """One arm's measured losses, which a predicted LR is held against."""

    lineage: str
    hidden_size: int
    method: str
    lrs: np.ndarray
    """Ascending."""
    losses: np.ndarray
    """At those LRs; NaN where a run gave none."""


def lineage(family: str) -> str:
    """The law's family of a transformers model type: `qwen` for qwen2, qwen3, qwen3_moe; an unknown one is its own."""
    return next((name for name in PUBLISHED.exponents if family.lower().startswith(name)), family.lower())


def predict(law: LrLaw, family: str, hidden_size: float, method: str) -> float:
    """The LR that a law predicts; NaN for a family that it has no exponent for.

    Args:
        law: constants.
        family: transformers model type, or lineage.
        hidden_size: width of the model.
        method: `fullft` or `lora`.
    """
    exponent = law.exponents.get(lineage(family), math.nan)
    return float(law.base * (law.multiplier if method == "lora" else 1.0) * (PIVOT / hidden_size) ** exponent)


def regret(lrs: np.ndarray, losses: np.ndarray, lr: float) -> np.ndarray:
    """How much worse an LR is than the best one measured, as a share of the lowest loss.

    The loss in between is interpolated linearly in log LR, as the authors do.

    Args:
        lrs: ascending, shape (n,).
        losses: at those LRs, shape (..., n); NaN where a run gave none.
        lr: the LR to judge.

    Returns:
        (loss(lr) - lowest) / lowest, shape (...): at least 0. NaN where the LR is not between two LRs with a loss.
    """
    losses = np.asarray(losses, dtype=float)
    log_lrs, log_lr = np.log(lrs), math.log(lr) if lr > 0 else math.nan
    # An LR of the grid, up to rounding, needs no neighbour.
    on_grid = np.flatnonzero(np.isclose(log_lrs, log_lr, rtol=0, atol=1e-9))
    if len(on_grid):
        loss = losses[..., on_grid[0]]
    elif log_lrs[0] < log_lr < log_lrs[-1]:
        above = int(np.searchsorted(log_lrs, log_lr))
        share = (log_lr - log_lrs[above - 1]) / (log_lrs[above] - log_lrs[above - 1])
        loss = (1 - share) * losses[..., above - 1] + share * losses[..., above]
    else:
        return np.full(losses.shape[:-1], math.nan)
    lowest = np.min(np.where(np.isnan(losses), math.inf, losses), axis=-1)
    return np.asarray((loss - lowest) / lowest)


def is_determined(problems: Sequence[LrProblem]) -> bool:
    """Whether the problems determine every constant of the law: both methods, and enough hidden sizes."""
    design, _ = _design(problems)
    return bool(len(problems)) and np.linalg.matrix_rank(design) == design.shape[1]


def fit(problems: Sequence[LrProblem]) -> LrLaw:
    """The law whose predictions have the lowest summed regret, as the authors fitted theirs.

    The regret in the sum goes on beyond a grid with its last slope, and a run without a loss counts as bad, so that
    the sum is finite everywhere. From the least-squares fit to the log of the best LRs, Nelder-Mead goes downhill.

    Args:
        problems: each with at least two losses.

    Raises:
        ValueError: the problems do not determine the constants.
    """
    if not is_determined(problems):
        raise ValueError("the sweeps do not determine the law: it needs both methods and several hidden sizes")
    design, lineages = _design(problems)
    curves = [_regret_everywhere(problem) for problem in problems]

    def summed_regret(constants: np.ndarray) -> float:
        return sum(curve(at) for curve, at in zip(curves, design @ constants, strict=True))

    best_lrs = np.array([problem.lrs[np.nanargmin(problem.losses)] for problem in problems])
    constants = np.linalg.lstsq(design, np.log(best_lrs), rcond=None)[0]
    # The sum has kinks, on which the simplex may collapse early; a fresh one goes on from there.
    for width in (0.5, 0.2, 0.05):
        simplex = np.vstack([constants, constants + width * np.eye(len(constants))])
        options = {"initial_simplex": simplex, "xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000, "maxfev": 4000}
        constants = optimize.minimize(summed_regret, constants, method="Nelder-Mead", options=options).x
    base, multiplier = np.exp(constants[:2]).tolist()
    return LrLaw(base, multiplier, dict(zip(lineages, constants[2:].tolist(), strict=True)))


def _design(problems: Sequence[LrProblem]) -> tuple[np.ndarray, list[str]]:
    """The law as a linear one in log LR: columns log base, log M, and an exponent per lineage."""
    lineages = sorted({problem.lineage for problem in problems})
    rows = [
        [1.0, problem.method == "lora"]
        + [math.log(PIVOT / problem.hidden_size) * (problem.lineage == name) for name in lineages]
        for problem in problems
    ]
    return np.array(rows, dtype=float).reshape(len(problems), 2 + len(lineages)), lineages


def _regret_everywhere(problem: LrProblem) -> Callable[[float], float]:
    """The regret by log LR, finite everywhere: see `fit`."""
    log_lrs = np.log(problem.lrs)
    lowest, highest = np.nanmin(problem.losses), np.nanmax(problem.losses)
    regrets = (np.where(np.isnan(problem.losses), 2 * highest - lowest, problem.losses) - lowest) / lowest
    slopes = np.abs(np.diff(regrets) / np.diff(log_lrs))

    def at(log_lr: float) -> float:
        beyond = slopes[0] * max(log_lrs[0] - log_lr, 0.0) + slopes[-1] * max(log_lr - log_lrs[-1], 0.0)
        return float(np.interp(log_lr, log_lrs, regrets) + beyond)

    return at
