"""The constants of the theories of the LR ratio, fitted to explored runs.

    python -m benchmarks.lr_ratio results/lr_ratio/tables

Reads `predictions.csv` of finished presets, and prints the section `predictions` of the theories that have constants to
fit: `movement` in two halves, c and k by the conditions in which A is frozen, and then u0 by those in which it is
trained; and `mu_a`. Conditions count by the inverse of their squared errors, each by runs of its own length.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from lorabench.analysis.lr_ratio import Setting, predicted
from lorabench.config.margins import LrRatioPredictions, MovementTheory, MuATheory

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

    def of_frozen(logs: np.ndarray) -> np.ndarray:
        c, k = np.exp(logs).tolist()
        movement = MovementTheory(c=c, u0=1.0, k=k)
        return residuals(frozen, "movement", LrRatioPredictions(movement=movement))

    c, k = np.exp(least_squares(of_frozen, [math.log(2.0), math.log(0.6)]).x).tolist()

    def of_moving(logs: np.ndarray) -> np.ndarray:
        movement = MovementTheory(c=c, u0=math.exp(logs[0]), k=k)
        return residuals(moving, "movement", LrRatioPredictions(movement=movement))

    u0 = math.exp(least_squares(of_moving, [math.log(4e-3)]).x[0])

    def of_mu_a(logs: np.ndarray) -> np.ndarray:
        return residuals(moving, "mu_a", LrRatioPredictions(mu_a=MuATheory(c=math.exp(logs[0]))))

    root = math.exp(least_squares(of_mu_a, [math.log(2.0)]).x[0])
    return LrRatioPredictions(movement=MovementTheory(c=c, u0=u0, k=k), mu_a=MuATheory(c=root))


def main() -> None:
    """Print the constants, and by how much the theories with them are off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", nargs="+", type=Path, help="folders with predictions.csv")
    rows = pd.concat([pd.read_csv(folder / "predictions.csv") for folder in parser.parse_args().tables])
    table = rows[rows["theory"].eq("still") & rows["runs"].eq("own") & rows["ratio_low"].notna()]
    constants = fitted(table)
    for name, theory in constants:
        if theory is not None:
            spoken = table if name == "movement" else table[~table["frozen"]]
            logs = residuals(spoken, name, constants)
            values = ", ".join(f"{key}: {value:.3g}" for key, value in theory)
            print(f"{name}: {{{values}}}  # {len(spoken)} conditions, chi-squared {float((logs**2).sum()):.1f}")


if __name__ == "__main__":
    main()
