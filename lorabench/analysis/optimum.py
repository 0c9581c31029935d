"""The optimal learning rate of an arm, by quadratic interpolation in log LR, with a bootstrap interval.

Position and value come from different splits: the optimum is located by the validation loss, and the loss at it is
the test loss. If both came from one split, the loss at the optimum would be biased low. A parabola through the test
losses could not locate it: around a minimum chosen on validation it may have no minimum.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_label, arm_table, check_runs, each_arm, first_seed
from lorabench.analysis.losses import with_losses
from lorabench.analysis.noise import sigma_of

MAX_STEP = 3.5
"""The widest ratio of neighbouring LRs around a resolved optimum: about half a decade, as from 3e-4 to 1e-3."""

_TAIL = 0.025  # on each side of a 95% interval


class LrGrid(NamedTuple):
    """One arm's runs of one seed, ascending in LR; each field has shape (n,)."""

    lr: np.ndarray
    validation: np.ndarray
    """Validation losses; NaN where a run has no finite losses."""
    test: np.ndarray
    """Test losses; NaN where a run has no finite losses."""
    diverged: np.ndarray
    """Whether each run diverged."""


def lr_grid(of_arm: pd.DataFrame) -> LrGrid:
    """Return the LR grid of an arm, from its runs with the first seed.

    Args:
        of_arm: the arm's runs, columns lr, seed, status, and the losses (see `with_losses`).
    """
    ascending = with_losses(first_seed(of_arm)).sort_values("lr")
    validation, test = (ascending[loss].to_numpy(float, na_value=math.nan) for loss in ("validation_loss", "test_loss"))
    usable = (ascending["status"] == "done").to_numpy(bool) & np.isfinite(validation) & np.isfinite(test)
    return LrGrid(
        lr=ascending["lr"].to_numpy(float),
        validation=np.where(usable, validation, math.nan),
        test=np.where(usable, test, math.nan),
        diverged=(ascending["status"] == "diverged").to_numpy(bool),
    )


def best_index(grid: LrGrid) -> int | None:
    """Return the index of the lowest validation loss, the first of equals; None if no run finished."""
    return int(np.nanargmin(grid.validation)) if np.isfinite(grid.validation).any() else None


def is_edge(grid: LrGrid, index: int) -> bool:
    """Return whether the optimum may lie beyond the grid, given the index of the lowest loss.

    It does not if the run at the next lower LR finished and the run at the next higher LR finished or diverged.
    """
    has_parabola, diverged_above = _bracket(grid, np.array([index]))
    return not (has_parabola | diverged_above).item()


def lr_optima(runs: pd.DataFrame, noise: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Estimate the optimal LR of each arm, from the LR grid of its first seed.

    Where the run above the minimum diverged, the optimum is bracketed but there is no parabola: `lr_opt` is then
    `lr_best`, and the interval reaches to both neighbours.

    Args:
        runs: columns run_id, ARM, lr, seed, status, and the losses (see `with_losses`).
        noise: as from `seed_noise`.
        n_bootstrap: number of draws of the parametric bootstrap, which adds Gaussian seed noise to each validation
            loss and locates the optimum again.
        seed: seed of the bootstrap.

    Returns:
        One row per arm: lr_best (lowest validation loss of the grid), lr_opt (interpolated), lr_low and lr_high (95%
        interval), loss_opt (test loss at lr_opt), edge (whether the optimum may lie outside of the grid), resolved,
        n_runs, n_diverged, run_ids (runs of the grid). `resolved` is False at an edge, without a sigma, with a
        neighbour further away than a factor of MAX_STEP, or if the interval reaches an edge of the grid.

    Raises:
        UserError: See `check_runs`.
    """
    check_runs(runs)
    rows = []
    for arm, of_arm in each_arm(runs):
        grid = lr_grid(of_arm)
        optimum = _optimum(grid, sigma_of(noise, arm, "validation"), n_bootstrap, arm_rng(arm, seed))
        counts = {"n_runs": len(grid.lr), "n_diverged": int(grid.diverged.sum())}
        rows.append(arm | optimum | counts | {"run_ids": list(first_seed(of_arm)["run_id"])})
    columns = ["lr_best", "lr_opt", "lr_low", "lr_high", "loss_opt", "edge", "resolved", "n_runs", "n_diverged"]
    return arm_table(rows, [*columns, "run_ids"])


def lr_draws(of_arm: pd.DataFrame, noise: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> np.ndarray:
    """Return the bootstrap draws of one arm's optimal LR from which `lr_optima` makes its interval.

    Draws of different arms are independent, so that the ratios of two arms' draws are draws of the ratio.

    Args:
        of_arm: the arm's runs, columns as for `lr_optima`.
        noise: as from `seed_noise`.
        n_bootstrap: number of draws.
        seed: seed of the bootstrap.

    Returns:
        LRs, shape (n_bootstrap,); NaN if no run finished or the noise is unknown.
    """
    [(arm, _)] = each_arm(of_arm)
    grid, sigma = lr_grid(of_arm), sigma_of(noise, arm, "validation")
    if best_index(grid) is None or not math.isfinite(sigma):
        return np.full(n_bootstrap, math.nan)
    draws, _ = _bootstrap(grid, sigma, n_bootstrap, arm_rng(arm, seed))
    return np.asarray(np.exp(draws))


def _optimum(grid: LrGrid, sigma: float, n_bootstrap: int, rng: np.random.Generator) -> dict[str, Any]:
    """Locate the optimum of one grid, as columns of `lr_optima`."""
    optimum: dict[str, Any] = dict.fromkeys(["lr_best", "lr_opt", "lr_low", "lr_high", "loss_opt"], math.nan)
    optimum |= {"edge": False, "resolved": False}
    best = best_index(grid)
    if best is None:
        return optimum
    edge, has_parabola = is_edge(grid, best), _bracket(grid, np.array([best]))[0].item()
    optimum |= {"lr_best": grid.lr[best], "lr_opt": grid.lr[best], "loss_opt": grid.test[best], "edge": edge}
    if has_parabola:
        around = slice(best - 1, best + 2)
        log_lrs = np.log(grid.lr[around])
        log_opt = vertex(log_lrs, grid.validation[around])
        loss_opt = _parabola_at(log_lrs, grid.test[around], log_opt.item())
        optimum |= {"lr_opt": np.exp(log_opt).item(), "loss_opt": loss_opt}
    if not math.isfinite(sigma):
        return optimum
    draws, edge_share = _bootstrap(grid, sigma, n_bootstrap, rng)
    low, high = np.exp(np.quantile(draws, [_TAIL, 1 - _TAIL])).tolist()
    if not edge:
        below, at, above = grid.lr[best - 1 : best + 2].tolist()
        if not has_parabola:
            low, high = min(low, below), max(high, above)
        optimum["resolved"] = max(at / below, above / at) <= MAX_STEP and edge_share <= _TAIL
    return optimum | {"lr_low": low, "lr_high": high}


def vertex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the position of the minimum of the parabola through three points, of which the middle is the lowest.

    Args:
        x: ascending positions, shape (..., 3).
        y: values, shape (..., 3).

    Returns:
        Positions, shape (...); the middle position if the three values are equal.
    """
    left, right = x[..., 0] - x[..., 1], x[..., 2] - x[..., 1]
    rise_left, rise_right = y[..., 0] - y[..., 1], y[..., 2] - y[..., 1]
    curvature = rise_left * right - rise_right * left
    flat = curvature == 0
    shift = (rise_left * right**2 - rise_right * left**2) / np.where(flat, 1.0, 2 * curvature)
    return np.asarray(x[..., 1] + np.where(flat, 0.0, shift))


def _parabola_at(x: np.ndarray, y: np.ndarray, at: float) -> float:
    """Return the value of the parabola through three points at a position."""
    return float(np.polyval(np.polyfit(x - x[1], y, 2), at - x[1]))


def _bootstrap(grid: LrGrid, sigma: float, n_bootstrap: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return draws of the log of the optimal LR, and the share of them that lie at an edge.

    A draw whose minimum is at an edge is the LR of the edge. If the run above its minimum diverged, the draw is uniform
    between the two neighbours, since nothing more is known. Noise is drawn independently for each LR although runs of
    one seed share their data order; this makes the interval wider, not narrower.
    """
    log_lrs = np.log(grid.lr)
    losses = grid.validation + sigma * rng.standard_normal((n_bootstrap, len(log_lrs)))
    best = np.nanargmin(losses, axis=1)
    has_parabola, diverged_above = _bracket(grid, best)

    draws = log_lrs[best]
    around = best[has_parabola][:, None] + np.arange(-1, 2)
    draws[has_parabola] = vertex(log_lrs[around], np.take_along_axis(losses[has_parabola], around, axis=1))
    capped = best[diverged_above]
    draws[diverged_above] = rng.uniform(log_lrs[capped - 1], log_lrs[capped + 1])
    return draws, float(np.mean(~(has_parabola | diverged_above)))


def _bracket(grid: LrGrid, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whether both neighbours of each index finished, and whether the lower finished and the upper diverged."""
    finished = np.concatenate([[False], np.isfinite(grid.validation), [False]])
    diverged = np.concatenate([[False], grid.diverged, [False]])
    # The arrays are padded by one, so `best` is the neighbour below and `best + 2` the neighbour above.
    return finished[best] & finished[best + 2], finished[best] & diverged[best + 2]


def arm_rng(arm: dict[str, Any], seed: int) -> np.random.Generator:
    """Return an arm's own generator, so that its interval does not depend on the other arms of the table."""
    name = "/".join([*(str(arm[column]) for column in ("model", "dataset", "batch_size", "steps")), arm_label(arm)])
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
