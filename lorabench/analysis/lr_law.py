"""The paper's law of the optimal LR, which depends on the method and the model's family and hidden size.

    LR = base * M * (2000 / hidden size) ** exponent        M is 1 for FullFT

The paper prints the formula without a base LR; all constants are in the authors' later code, `get_lr` of
`hyperparam_utils` in the repository thinking-machines-lab/tinker-cookbook. The law does not depend on rank, dataset,
batch size or number of steps, so its constants hold for the data they were fitted on.

The paper fits it to the losses of many models by the summed regret, which is the rise of the loss at the predicted LR
as a share of the lowest loss. Here the losses of an arm are a parabola in ln LR (see `loss_fit`), so its regret is the
curvature over the lowest loss times the squared error of ln LR, and the fit is weighted least squares. The constants
are then linear in the optima, so that draws of the optima's errors give those of the law's predictions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
    """Return the LR that a law predicts; NaN for a family without an exponent.

    Args:
        law: the constants.
        family: the transformers model type, or the lineage.
        hidden_size: the hidden size of the model.
        method: `fullft` or `lora`.
    """
    exponent = law.exponents.get(lineage(family), math.nan)
    return float(law.base * (law.multiplier if method == "lora" else 1.0) * (PIVOT / hidden_size) ** exponent)


def is_determined(optima: Sequence[ArmOptimum]) -> bool:
    """Return whether the optima determine all constants: they need both methods and several hidden sizes."""
    return _constants_from(_design(optima), optima) is not None


def fit_lr_law(optima: Sequence[ArmOptimum]) -> LrLaw:
    """Fit the law whose predictions have the lowest summed regret, the criterion of the paper's fit.

    Raises:
        ValueError: The optima do not determine the constants.
    """
    from_optima = _constants_from(_design(optima), optima)
    if from_optima is None:
        raise ValueError("the sweeps do not determine the law: it needs both methods and several hidden sizes")
    constants = from_optima @ np.array([optimum.log_lr for optimum in optima])
    base, multiplier = np.exp(constants[:2]).tolist()
    return LrLaw(base, multiplier, dict(zip(_lineages(optima), constants[2:].tolist(), strict=True)))


def prediction_errors(optima: Sequence[ArmOptimum], left_out: Sequence[Hashable] | None = None) -> np.ndarray:
    """Return the matrix that maps the optima's ln LR to the errors of the predictions (ln predicted - ln optimal).

    Args:
        optima: the optima, n of them.
        left_out: by default the law is fitted to all optima; otherwise a label for each optimum, which is predicted by
            the law that is fitted to the optima with other labels.

    Returns:
        The matrix, shape (n, n); a row is NaN where the law is not determined.
    """
    design, n = _design(optima), len(optima)
    labels = list(left_out) if left_out is not None else [None] * n
    errors = np.full((n, n), math.nan)
    for label in dict.fromkeys(labels):
        predicted = [row for row in range(n) if labels[row] == label]
        fitted = [row for row in range(n) if left_out is None or labels[row] != label]
        from_optima = _constants_from(design[fitted], [optima[row] for row in fitted])
        if from_optima is not None:
            errors[predicted] = 0.0
            errors[np.ix_(predicted, fitted)] = design[predicted] @ from_optima
            errors[predicted] -= np.eye(n)[predicted]
    return errors


def _lineages(optima: Sequence[ArmOptimum]) -> list[str]:
    return sorted({optimum.lineage for optimum in optima})


def _design(optima: Sequence[ArmOptimum]) -> np.ndarray:
    """Return the design matrix of the law, which is linear in ln LR.

    The columns belong to ln base, ln M and an exponent per lineage.
    """
    lineages = _lineages(optima)
    rows = [
        [1.0, optimum.method == "lora"]
        + [math.log(PIVOT / optimum.hidden_size) * (optimum.lineage == name) for name in lineages]
        for optimum in optima
    ]
    return np.array(rows, dtype=float).reshape(len(optima), 2 + len(lineages))


def _constants_from(design: np.ndarray, optima: Sequence[ArmOptimum]) -> np.ndarray | None:
    """Return the matrix that maps ln LRs to the law's constants; None if they are not determined."""
    if not len(optima) or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    weights = np.sqrt([optimum.steepness for optimum in optima])
    return np.asarray(np.linalg.pinv(design * weights[:, None]) * weights)
