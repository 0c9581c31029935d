"""Rewards of reinforcement learning: error rates as losses, accuracies over training, and ranges of good LRs.

An error rate, 1 - accuracy, is a loss: lower is better, the LR is picked by it on the validation split, it is reported
on the test split, and it has seed noise. `with_error_rates` puts it into the columns `validation_loss` and `test_loss`
(see `lorabench.analysis.losses`), so that the same code computes the noise, optimal LRs and gaps of supervised runs and
of RL runs.

Near an accuracy of 1 many LRs may be equally good. The optimal LR is then the lowest of them, which means little. Its
interval shows this, since noise moves the optimum anywhere on the flat top. If all seeds agree exactly, the noise is
unknown, so there is no interval and the optimum is not resolved.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm, first_seed
from lorabench.analysis.gaps import best_losses
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.analysis.optimum import LrGrid, arm_rng, best_index, lr_grid, lr_optima
from lorabench.tables.checks import is_rl

GOOD = 0.95
"""The least share of an arm's own peak accuracy that a good LR reaches."""

TestReward = Literal["final_reward", "best_reward"]


def with_error_rates(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """Return the RL runs with their error rates as losses.

    A run that never got a reward counts as finished: its policy is the base model, whose accuracies it has.

    Args:
        runs: columns task, status, final_valid_reward and the column that `test_reward` names; without the column task,
            no run is RL.
        test_reward: the test accuracy to report: after the last step (`final_reward`), or at the evaluation with the
            best validation accuracy (`best_reward`).

    Returns:
        The RL runs with status done or diverged, validation_loss = 1 - final_valid_reward and test_loss = 1 -
        `test_reward`. With either test reward, the LR is picked by the validation accuracy after the last step.
    """
    rl = runs[is_rl(runs)]
    return rl.assign(
        status=rl["status"].replace("unrewarded", "done"),
        validation_loss=1 - rl["final_valid_reward"].astype(float),
        test_loss=1 - rl[test_reward].astype(float),
    )


def reward_optima(runs: pd.DataFrame) -> pd.DataFrame:
    """Estimate the optimal LR of each arm by validation accuracy, and the test accuracy there.

    Args:
        runs: columns run_id, ARM, lr, seed, task, status, final_valid_reward, final_reward.

    Returns:
        One row per arm as from `lr_optima` (lr_best, lr_opt, lr_low, lr_high, edge, resolved, n_runs, n_diverged,
        run_ids), with reward_opt (test accuracy at lr_opt, 0 to 1) in place of loss_opt.

    Raises:
        UserError: See `check_runs`.
    """
    with_errors = with_error_rates(runs)
    optima = lr_optima(with_errors, _noise(with_errors))
    # The interpolated error rate can be below 0.
    return optima.assign(reward_opt=(1 - optima["loss_opt"]).clip(0, 1)).drop(columns="loss_opt")


def _noise(with_errors: pd.DataFrame) -> pd.DataFrame:
    """Return the seed noise of error rates; a noise of exactly 0 counts as unknown."""
    noise = seed_noise(with_errors)
    return noise.assign(**{name: noise[name].where(noise[name] > 0) for name in ("sigma", "sigma_valid")})


def reward_curves(
    runs: pd.DataFrame, curves: pd.DataFrame, split: str = "train", metric: str = "reward"
) -> pd.DataFrame:
    """Return a metric over training at each arm's best LR, which has the highest validation accuracy of the LR grid.

    Args:
        runs: columns as for `reward_optima`.
        curves: columns run_id, step, split, metric, value, and optionally examples.
        split: the split of the curves: train, validation, test, or the name of a held-out problem set.
        metric: the metric of the curves, such as reward (train), accuracy (other splits), response_length.

    Returns:
        One row per arm and step, ascending: lr, step, episodes, mean and sd over the finished seeds that have the step
        (in the metric's unit; sd NaN with one seed), n_seeds, run_ids.

    Raises:
        UserError: See `check_runs`.
    """
    points = points_of(curves, split, metric).sort_values(["step", "run_id"])
    rows: list[dict[Hashable, Any]] = []
    for best in best_losses(with_error_rates(runs)).to_dict("records"):
        of_arm = points[points["run_id"].isin(best["run_ids"])]
        rows += [
            best
            | {"lr": best["lr_best"], "step": step, "episodes": at_step["examples"].max()}
            | {"mean": float(at_step["value"].mean()), "sd": float(at_step["value"].std())}
            | {"n_seeds": len(at_step), "run_ids": list(at_step["run_id"])}
            for step, at_step in of_arm.groupby("step")
        ]
    table = arm_table(rows, ["lr", "step", "episodes", "mean", "sd", "n_seeds", "run_ids"])
    return table.astype({"step": "Int64", "episodes": "Int64"})


def points_of(curves: pd.DataFrame, split: str, metric: str) -> pd.DataFrame:
    """Return the points of one metric: run_id, step, examples (null where missing) and value (never null)."""
    columns = ["run_id", "step", "examples", "value"]
    if curves.empty:
        return pd.DataFrame(columns=columns)
    chosen = (curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()
    return curves[chosen.astype(bool)].reindex(columns=columns)


def good_bands(runs: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Measure the width of each arm's range of good LRs, whose test accuracy is at least GOOD times the arm's peak.

    The peak is the test accuracy at the LR with the highest validation accuracy. The accuracy is interpolated linearly
    in log LR between the LRs of the grid; it is 0 at a diverged run. The width is the total length of all good
    segments, so that one bad run does not cut off the good LRs beyond it.

    Args:
        runs: columns as for `reward_optima`.
        n_bootstrap: number of draws of the parametric bootstrap, which adds Gaussian seed noise to each accuracy.
        seed: seed of the bootstrap.

    Returns:
        One row per arm: lr_best, peak (accuracy), threshold (GOOD * peak), width (decades of LR), width_low and
        width_high (95% interval; NaN without seed noise), step (widest spacing of the grid at good LRs in decades,
        which is about the error of the width by interpolation), lr_low and lr_high (lowest and highest good LR),
        open_low and open_high (whether the lowest or highest LR of the grid is good, so that the width is a lower
        bound), n_runs, n_diverged, run_ids. NaN where no run finished or the peak is 0.

    Raises:
        UserError: See `check_runs`.
    """
    with_errors = with_error_rates(runs)
    check_runs(with_errors)
    noise = _noise(with_errors)
    rows = []
    for arm, of_arm in each_arm(with_errors):
        grid = lr_grid(of_arm)
        low, high = band_draws(of_arm, noise, n_bootstrap, seed).interval
        counts = {"n_runs": len(grid.lr), "n_diverged": int(grid.diverged.sum())}
        run_ids = {"run_ids": list(first_seed(of_arm)["run_id"])}
        rows.append(arm | _band(grid) | {"width_low": low, "width_high": high} | counts | run_ids)
    ends = [
        "width_low",
        "width_high",
        "step",
        "lr_low",
        "lr_high",
        "open_low",
        "open_high",
        "n_runs",
        "n_diverged",
        "run_ids",
    ]
    return arm_table(rows, ["lr_best", "peak", "threshold", "width", *ends])


@dataclass(frozen=True)
class BandDraws:
    """Bootstrap draws of the width of one arm's range of good LRs; draws of different arms are independent."""

    widths: np.ndarray
    """Widths in decades of LR, shape (n_bootstrap,); NaN where `good_bands` has no interval."""
    open: np.ndarray
    """Whether the range of a draw reaches an edge of the grid, so that its width is a lower bound."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the width in decades."""
        low, high = np.quantile(self.widths, [0.025, 0.975]).tolist()
        return low, high


def band_draws(of_arm: pd.DataFrame, noise: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> BandDraws:
    """Return the bootstrap draws from which `good_bands` makes an arm's interval.

    Args:
        of_arm: the arm's runs as from `with_error_rates`.
        noise: as from `seed_noise` of runs from `with_error_rates`.
        n_bootstrap: number of draws.
        seed: seed of the bootstrap.
    """
    [(arm, _)] = each_arm(of_arm)
    grid = lr_grid(of_arm)
    sigmas = [sigma_of(noise, arm, split) for split in ("validation", "test")]
    if not _band(grid)["peak"] > 0 or not np.isfinite(sigmas).all():
        return BandDraws(np.full(n_bootstrap, math.nan), np.zeros(n_bootstrap, bool))
    rng = arm_rng(arm, seed)
    validation, test = (
        np.clip(1 - error + sigma * rng.standard_normal((n_bootstrap, len(grid.lr))), 0, 1)
        for error, sigma in zip((grid.validation, grid.test), sigmas, strict=True)
    )
    accuracy = np.where(grid.diverged, 0.0, test)
    threshold = GOOD * np.take_along_axis(test, np.nanargmax(validation, axis=1)[:, None], axis=1)
    lengths = _good_shares(accuracy, threshold) * np.diff(np.log10(grid.lr))
    return BandDraws(lengths.sum(axis=1), np.asarray((accuracy[:, [0, -1]] >= threshold).any(axis=1)))


def _band(grid: LrGrid) -> dict[str, Any]:
    """Return the peak and the range of good LRs of one grid, as columns of `good_bands`."""
    numbers = ["lr_best", "peak", "threshold", "width", "step", "lr_low", "lr_high"]
    band: dict[str, Any] = dict.fromkeys(numbers, math.nan)
    band |= {"open_low": False, "open_high": False}
    best = best_index(grid)
    if best is None:
        return band
    peak = float(1 - grid.test[best])
    band |= {"lr_best": float(grid.lr[best]), "peak": peak, "threshold": GOOD * peak}
    if peak <= 0:
        return band
    log_lrs, accuracy = np.log10(grid.lr), np.where(grid.diverged, 0.0, 1 - grid.test)
    good = np.flatnonzero(accuracy >= GOOD * peak)
    first, last = int(good[0]), int(good[-1])
    steps = np.diff(log_lrs)
    shares = _good_shares(accuracy, np.array(GOOD * peak)) * steps
    low, high = log_lrs[first], log_lrs[last]
    # The line is still good for a part of the segments below the first good LR and above the last.
    low -= shares[first - 1] if first else 0.0
    high += shares[last] if last < len(shares) else 0.0
    band |= {"lr_low": float(10**low), "lr_high": float(10**high), "width": float(shares.sum())}
    band["step"] = float(steps[shares > 0].max(initial=0.0))
    return band | {"open_low": first == 0, "open_high": last == len(shares)}


def _good_shares(accuracy: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Return the share of each segment between neighbouring LRs on which the line is at least the threshold."""
    above = accuracy - threshold
    ends = np.stack([above[..., :-1], above[..., 1:]])
    lower, upper = ends.min(axis=0), ends.max(axis=0)
    part = np.clip(upper, 0, None) / np.where(upper > lower, upper - lower, 1.0)
    return np.where(lower >= 0, 1.0, part)
