"""The optimal learning rate of an arm, by quadratic interpolation in log LR, with a bootstrap interval.

Position and value come from different splits: the optimum is found on the validation loss, and the loss there is
read from the test split. Were both taken from one split, the loss at the optimum would look better than it is; and
a parabola through the test losses around a minimum chosen on validation may have no minimum between them.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table, check_runs, each_arm, first_seed
from lorabench.analysis.noise import sigma_of

MAX_STEP = 3.5
"""Widest ratio between neighbouring LRs around a resolved optimum: half a decade, as 3e-4 to 1e-3 is usually meant."""

_TAIL = 0.025  # on each side of a 95% interval


class LrGrid(NamedTuple):
    """One arm's runs of one seed, ascending in LR. Losses are NaN where a run gave none that is finite."""

    lr: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    diverged: np.ndarray


def lr_grid(of_arm: pd.DataFrame) -> LrGrid:
    """The LR grid of an arm, from its runs with the first seed.

    Args:
        of_arm: the arm's runs, columns lr, seed, status, final_valid_nll, final_test_nll.
    """
    ascending = first_seed(of_arm).sort_values("lr")
    valid, test = (ascending[loss].to_numpy(float, na_value=math.nan) for loss in ("final_valid_nll", "final_test_nll"))
    usable = (ascending["status"] == "done").to_numpy(bool) & np.isfinite(valid) & np.isfinite(test)
    return LrGrid(
        lr=ascending["lr"].to_numpy(float),
        valid=np.where(usable, valid, math.nan),
        test=np.where(usable, test, math.nan),
        diverged=(ascending["status"] == "diverged").to_numpy(bool),
    )


def best_index(grid: LrGrid) -> int | None:
    """Index of the lowest validation loss, at the lower LR of equals; None if no run finished."""
    return int(np.nanargmin(grid.valid)) if np.isfinite(grid.valid).any() else None


def is_edge(grid: LrGrid, index: int) -> bool:
    """Whether the optimum may lie beyond what was run, if that is the index of the lowest loss.

    It is bracketed by a finished run at the next lower LR and, at the next higher, one that finished or diverged.
    """
    has_parabola, diverged_above = _bracket(grid, np.array([index]))
    return not (has_parabola | diverged_above).item()


def lr_optima(runs: pd.DataFrame, noise: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The optimal LR of each arm, from the LR grid of its first seed.

    Where the minimum's upper neighbour diverged the optimum is bracketed but there is no parabola: `lr_opt` is then
    `lr_best`, and the interval reaches to both neighbours.

    Args:
        runs: columns run_id, ARM, lr, seed, status, final_valid_nll, final_test_nll.
        noise: as from `seed_noise`.
        n_bootstrap: draws of the parametric bootstrap: each validation loss plus Gaussian seed noise, fitted again.
        seed: of the bootstrap.

    Returns:
        One row per arm: lr_best (lowest validation loss of the grid), lr_opt (interpolated), lr_low and lr_high (95%
        interval), nll_opt (test NLL at lr_opt, nats per token), edge (the optimum may lie outside of the grid),
        resolved, n_runs, n_diverged, run_ids (the arm's grid). `resolved` is False at an edge, with no sigma, with
        neighbours further off than `MAX_STEP`, or if the interval reaches an edge, beyond which nothing is known.

    Raises:
        UserError: see `check_runs`.
    """
    check_runs(runs)
    rows = []
    for arm, of_arm in each_arm(runs):
        grid = lr_grid(of_arm)
        found = _optimum(grid, sigma_of(noise, arm, "validation"), n_bootstrap, arm_rng(arm, seed))
        counts = {"n_runs": len(grid.lr), "n_diverged": int(grid.diverged.sum())}
        rows.append(arm | found | counts | {"run_ids": list(first_seed(of_arm)["run_id"])})
    columns = ["lr_best", "lr_opt", "lr_low", "lr_high", "nll_opt", "edge", "resolved", "n_runs", "n_diverged"]
    return arm_table(rows, [*columns, "run_ids"])


def lr_draws(of_arm: pd.DataFrame, noise: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> np.ndarray:
    """Bootstrap draws of one arm's optimal LR, those behind its interval in `lr_optima`; NaN with no sigma.

    Draws of different arms are independent, so that the draws of a ratio are the ratios of their draws.

    Args:
        of_arm: the arm's runs, columns as for `lr_optima`.
        noise: as from `seed_noise`.
        n_bootstrap: number of draws.
        seed: of the bootstrap.
    """
    [(arm, _)] = each_arm(of_arm)
    grid, sigma = lr_grid(of_arm), sigma_of(noise, arm, "validation")
    if best_index(grid) is None or not math.isfinite(sigma):
        return np.full(n_bootstrap, math.nan)
    draws, _ = _bootstrap(grid, sigma, n_bootstrap, arm_rng(arm, seed))
    return np.asarray(np.exp(draws))


def _optimum(grid: LrGrid, sigma: float, n_bootstrap: int, rng: np.random.Generator) -> dict[str, Any]:
    """Where the optimum of one grid lies, as columns of `lr_optima`."""
    found: dict[str, Any] = dict.fromkeys(["lr_best", "lr_opt", "lr_low", "lr_high", "nll_opt"], math.nan)
    found |= {"edge": False, "resolved": False}
    best = best_index(grid)
    if best is None:
        return found
    edge, has_parabola = is_edge(grid, best), _bracket(grid, np.array([best]))[0].item()
    found |= {"lr_best": grid.lr[best], "lr_opt": grid.lr[best], "nll_opt": grid.test[best], "edge": edge}
    if has_parabola:
        around = slice(best - 1, best + 2)
        log_lrs = np.log(grid.lr[around])
        log_opt = vertex(log_lrs, grid.valid[around])
        found |= {"lr_opt": np.exp(log_opt).item(), "nll_opt": _through(log_lrs, grid.test[around], log_opt.item())}
    if not math.isfinite(sigma):
        return found
    draws, edge_share = _bootstrap(grid, sigma, n_bootstrap, rng)
    low, high = np.exp(np.quantile(draws, [_TAIL, 1 - _TAIL])).tolist()
    if not edge:
        below, at, above = grid.lr[best - 1 : best + 2].tolist()
        if not has_parabola:
            low, high = min(low, below), max(high, above)
        found["resolved"] = max(at / below, above / at) <= MAX_STEP and edge_share <= _TAIL
    return found | {"lr_low": low, "lr_high": high}


def vertex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the parabola through three points (the last axis), the middle one lowest, has its minimum.

    Three equal values have none; the answer is then the middle one.
    """
    left, right = x[..., 0] - x[..., 1], x[..., 2] - x[..., 1]
    rise_left, rise_right = y[..., 0] - y[..., 1], y[..., 2] - y[..., 1]
    curvature = rise_left * right - rise_right * left
    flat = curvature == 0
    shift = (rise_left * right**2 - rise_right * left**2) / np.where(flat, 1.0, 2 * curvature)
    return np.asarray(x[..., 1] + np.where(flat, 0.0, shift))


def _through(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """The value at a position of the parabola through three points."""
    return float(np.polyval(np.polyfit(x - x[1], y, 2), at - x[1]))


def _bootstrap(grid: LrGrid, sigma: float, n_bootstrap: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draws of the log of the optimal LR, and the share of them that lie at an edge.

    A draw at an edge is that LR; one below a diverged run is uniform between its neighbours, all that is known.
    Noise is drawn independently for each LR, though runs of one seed share their data order: that is cautious.
    """
    log_lrs = np.log(grid.lr)
    losses = grid.valid + sigma * rng.standard_normal((n_bootstrap, len(log_lrs)))
    best = np.nanargmin(losses, axis=1)
    has_parabola, diverged_above = _bracket(grid, best)

    draws = log_lrs[best]
    around = best[has_parabola][:, None] + np.arange(-1, 2)
    draws[has_parabola] = vertex(log_lrs[around], np.take_along_axis(losses[has_parabola], around, axis=1))
    capped = best[diverged_above]
    draws[diverged_above] = rng.uniform(log_lrs[capped - 1], log_lrs[capped + 1])
    return draws, float(np.mean(~(has_parabola | diverged_above)))


def _bracket(grid: LrGrid, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For indices of lowest losses: whether both neighbours finished; whether the lower did and the upper diverged."""
    finished = np.concatenate([[False], np.isfinite(grid.valid), [False]])
    diverged = np.concatenate([[False], grid.diverged, [False]])
    # In the padded arrays, best is the neighbour below and best + 2 the one above.
    return finished[best] & finished[best + 2], finished[best] & diverged[best + 2]


def arm_rng(arm: dict[str, Any], seed: int) -> np.random.Generator:
    """Random numbers of an arm's own, so that its interval does not depend on which other arms are in the table."""
    name = "/".join([*(str(arm[column]) for column in ("model", "dataset", "batch_size", "steps")), arm_label(arm)])
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
