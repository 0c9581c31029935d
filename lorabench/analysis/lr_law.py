"""The paper's law of the optimal LR, which depends on the method and the model's family and hidden size.

    LR = base * M * (2000 / hidden size) ** exponent        M is 1 for FullFT

The paper prints the formula without a base LR; all constants are in the authors' later code, `get_lr` of
`hyperparam_utils` in the repository thinking-machines-lab/tinker-cookbook. The law does not depend on rank, dataset,
batch size or number of steps, so its constants hold for the data they were fitted on.
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
    """The constants of the law."""

    base: float
    """Optimal LR of FullFT at hidden size PIVOT."""
    multiplier: float
    """M: the optimal LR of LoRA divided by that of FullFT."""
    exponents: Mapping[str, float]
    """The exponent of each lineage (see `lineage`)."""


PUBLISHED = LrLaw(base=5e-5, multiplier=10.0, exponents={"llama": 0.781, "qwen": 0.0775})
"""The constants in the authors' code, for supervised fine-tuning at batch size 128."""


class LrProblem(NamedTuple):
    """One arm's measured losses by LR, by which a predicted LR is scored."""

    lineage: str
    hidden_size: int
    method: str
    lrs: np.ndarray
    """Ascending, shape (n,)."""
    losses: np.ndarray
    """Losses at these LRs, shape (n,); NaN where no run finished."""


def lineage(family: str) -> str:
    """Return the lineage of a transformers model type: `qwen` for qwen2, qwen3, qwen3_moe; others are their own."""
    return next((name for name in PUBLISHED.exponents if family.lower().startswith(name)), family.lower())


def predict_lr(law: LrLaw, family: str, hidden_size: float, method: str) -> float:
    """Return the LR that a law predicts; NaN for a family without an exponent.

    Args:
        law: the constants.
        family: the transformers model type, or the lineage.
        hidden_size: the hidden size of the model.
        method: `fullft` or `lora`.
    """
    exponent = law.exponents.get(lineage(family), math.nan)
    return float(law.base * (law.multiplier if method == "lora" else 1.0) * (PIVOT / hidden_size) ** exponent)


def lr_regret(lrs: np.ndarray, losses: np.ndarray, lr: float) -> np.ndarray:
    """Compute how much worse an LR is than the best measured LR, relative to the lowest loss.

    Losses between the LRs are interpolated linearly in log LR, as in the paper's fit.

    Args:
        lrs: the measured LRs, ascending, shape (n,).
        losses: the losses at these LRs, shape (..., n); NaN where no run finished.
        lr: the LR to judge.

    Returns:
        (loss(lr) - lowest) / lowest, shape (...), at least 0; NaN where the LR is not between two LRs with a loss.
    """
    losses = np.asarray(losses, dtype=float)
    log_lrs, log_lr = np.log(lrs), math.log(lr) if lr > 0 else math.nan
    # An LR on the grid, up to rounding, needs no interpolation between neighbours that may lack a loss.
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
    """Return whether the problems determine all constants: they need both methods and several hidden sizes."""
    design, _ = _design(problems)
    return bool(len(problems)) and np.linalg.matrix_rank(design) == design.shape[1]


def fit_lr_law(problems: Sequence[LrProblem]) -> LrLaw:
    """Fit the law whose predictions have the lowest summed regret, the criterion of the paper's fit.

    The regret is extrapolated beyond a grid with its last slope, and a run without a loss counts as worse than the
    worst, so that the sum is finite everywhere. It is minimized by Nelder-Mead, which starts at the least-squares fit
    to the log of the best LRs.

    Args:
        problems: the measured losses of arms, each with at least two losses.

    Raises:
        ValueError: The problems do not determine the constants.
    """
    if not is_determined(problems):
        raise ValueError("the sweeps do not determine the law: it needs both methods and several hidden sizes")
    design, lineages = _design(problems)
    curves = [_regret_everywhere(problem) for problem in problems]

    def summed_regret(constants: np.ndarray) -> float:
        return sum(curve(at) for curve, at in zip(curves, design @ constants, strict=True))

    best_lrs = np.array([problem.lrs[np.nanargmin(problem.losses)] for problem in problems])
    constants = np.linalg.lstsq(design, np.log(best_lrs), rcond=None)[0]
    # The sum has kinks, at which the simplex may collapse too early, so the search restarts there with a new simplex.
    for width in (0.5, 0.2, 0.05):
        simplex = np.vstack([constants, constants + width * np.eye(len(constants))])
        options = {"initial_simplex": simplex, "xatol": 1e-7, "fatol": 1e-12, "maxiter": 4000, "maxfev": 4000}
        constants = optimize.minimize(summed_regret, constants, method="Nelder-Mead", options=options).x
    base, multiplier = np.exp(constants[:2]).tolist()
    return LrLaw(base, multiplier, dict(zip(lineages, constants[2:].tolist(), strict=True)))


def _design(problems: Sequence[LrProblem]) -> tuple[np.ndarray, list[str]]:
    """Return the design matrix of the law, which is linear in log LR, and its lineages.

    The columns belong to log base, log M and an exponent per lineage.
    """
    lineages = sorted({problem.lineage for problem in problems})
    rows = [
        [1.0, problem.method == "lora"]
        + [math.log(PIVOT / problem.hidden_size) * (problem.lineage == name) for name in lineages]
        for problem in problems
    ]
    return np.array(rows, dtype=float).reshape(len(problems), 2 + len(lineages)), lineages


def _regret_everywhere(problem: LrProblem) -> Callable[[float], float]:
    """Return the regret as a function of log LR that is finite everywhere; see `fit_lr_law`."""
    log_lrs = np.log(problem.lrs)
    lowest, highest = np.nanmin(problem.losses), np.nanmax(problem.losses)
    regrets = (np.where(np.isnan(problem.losses), 2 * highest - lowest, problem.losses) - lowest) / lowest
    slopes = np.abs(np.diff(regrets) / np.diff(log_lrs))

    def at(log_lr: float) -> float:
        beyond = slopes[0] * max(log_lrs[0] - log_lr, 0.0) + slopes[-1] * max(log_lr - log_lrs[-1], 0.0)
        return float(np.interp(log_lr, log_lrs, regrets) + beyond)

    return at
