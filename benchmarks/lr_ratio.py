"""The constants of the theories of the LR ratio, fitted to explored runs.

    python -m benchmarks.lr_ratio results/lr_ratio/tables

Reads `predictions.csv` of finished presets, and prints the section `predictions` of the theories that have constants to
fit: `movement` in two halves, c and k by the conditions in which A is frozen, and then u0 by those in which it is
trained; and its rivals `mu_a`, `scale` and `fixed_lora`. Conditions count by the inverse of their squared errors, each
by runs of its own length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.lr_ratio import BATCH_SIZE, STEPS, Setting, predicted
from lorabench.config.margins import (
    DEFAULT_PREDICTIONS,
    LrRatioPredictions,
    MovementTheory,
    MuATheory,
    ScaleTheory,
)

LEAST_ERROR = 0.1
"""The least standard error of the logarithm of a ratio that a condition counts with, since no theory is exact."""


def settings_of(table: pd.DataFrame) -> list[Setting]:
    """Return the setting of each row."""
    names = ["width", "steps", "batch_size", "alpha", "init_a", "frozen", "rank"]
    return [Setting(*row) for row in table[names].itertuples(index=False, name=None)]


def residuals(table: pd.DataFrame, theory: str, predictions: LrRatioPredictions) -> np.ndarray:
    """Return ln(measured / predicted) over its standard error, (conditions,)."""
    at_lrs = zip(settings_of(table), np.log(table["fullft_lr"]), strict=True)
    said = np.array([float(predicted(predictions, setting)[theory](np.asarray(lr))) for setting, lr in at_lrs])
    # A 95% interval is 3.92 standard errors wide.
    errors = np.maximum(np.log(table["ratio_high"] / table["ratio_low"]) / 3.92, LEAST_ERROR)
    return np.asarray((np.log(table["ratio"]) - said) / errors)


def fitted(table: pd.DataFrame) -> LrRatioPredictions:
    """Fit the constants to the rows of conditions, one row for each."""
    frozen, moving = table[table["frozen"]], table[~table["frozen"]]
    usual = moving[moving["init_a"].eq(1)]
    short = usual[usual["steps"].eq(STEPS) & usual["batch_size"].eq(BATCH_SIZE) & usual["alpha"].eq(ALPHA)]

    def fit(rows: pd.DataFrame, name: str, make: Callable[..., LrRatioPredictions], *start: float) -> list[float]:
        """Return the constants, from which `make` makes predictions, whose residuals are the smallest."""
        solved = least_squares(lambda logs: residuals(rows, name, make(*np.exp(logs).tolist())), np.log(start))
        return [float(value) for value in np.exp(solved.x)]

    def movement(c: float, k: float, u0: float = 1.0) -> LrRatioPredictions:
        return LrRatioPredictions(movement=MovementTheory(c=c, u0=u0, k=k))

    def fixed(ratio: float) -> LrRatioPredictions:
        stated = DEFAULT_PREDICTIONS.lr_ratio.fixed_lora
        return LrRatioPredictions(fixed_lora=stated and stated.model_copy(update={"ratio": ratio}))

    c, k = fit(frozen, "movement", movement, 2.0, 0.6)
    [u0] = fit(moving, "movement", lambda u0: movement(c, k, u0), 2e-3)
    [root] = fit(moving, "mu_a", lambda c: LrRatioPredictions(mu_a=MuATheory(c=c)), 2.0)
    by_scale = fit(usual, "scale", lambda c, kappa: LrRatioPredictions(scale=ScaleTheory(c=c, kappa=kappa)), 2.25, 0.2)
    return LrRatioPredictions(
        movement=MovementTheory(c=c, u0=u0, k=k),
        mu_a=MuATheory(c=root),
        scale=ScaleTheory(c=by_scale[0], kappa=by_scale[1]),
        fixed_lora=fixed(*fit(short, "fixed_lora", fixed, 4.0)).fixed_lora,
    )


def main() -> None:
    """Print the constants, and by how much the theories with them are off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", nargs="+", type=Path, help="folders with predictions.csv")
    rows = pd.concat([pd.read_csv(folder / "predictions.csv") for folder in parser.parse_args().tables])
    table = rows[rows["theory"].eq("still") & rows["runs"].eq("own") & rows["ratio_low"].notna()]
    constants = fitted(table)
    for name, theory in constants:
        if theory is not None:
            settings = settings_of(table)
            spoken = table[[name in predicted(constants, setting) for setting in settings]]
            logs = residuals(spoken, name, constants)
            values = ", ".join(f"{key}: {value:.3g}" for key, value in theory)
            print(f"{name}: {{{values}}}  # {len(spoken)} conditions, chi-squared {float((logs**2).sum()):.1f}")


if __name__ == "__main__":
    main()
