"""Rewards of reinforcement learning: accuracies by learning rate and over training.

An error rate, 1 - accuracy, is a loss: lower is better, it is picked on the validation split and reported on the test
split, and it has seed noise. `errors` puts it where the other modules look for final losses, so that noise, optimal
LRs and gaps of RL runs are computed by the code that computes those of supervised runs. Only here and in the claims on
RL do `final_valid_nll` and `final_test_nll` hold error rates (shares of 0 to 1); no table is written from such runs.

Near an accuracy of 1 many LRs may be equally good. The optimal LR is then the lowest of them, which means little; its
interval says so, since noise moves the optimum all over the flat top. Where all seeds agree there is no noise that
would tell, so there is no interval and the optimum is not resolved.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lorabench.analysis.arms import arm_table, check_runs, each_arm, first_seed, is_rl
from lorabench.analysis.gaps import best_losses
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.analysis.optimum import LrGrid, arm_rng, best_index, lr_grid, lr_optima

GOOD = 0.95
"""Share of an arm's own peak from which on an LR counts as good."""

TestReward = Literal["final_reward", "best_reward"]


def errors(runs: pd.DataFrame, test_reward: TestReward = "final_reward") -> pd.DataFrame:
    """The RL runs with error rates for final losses, so that everything made for losses fits.

    A run that never got a reward counts as finished: its policy is the base, whose rewards it has.

    Args:
        runs: columns status, final_valid_reward and that of `test_reward`; task, without which no run is RL.
        test_reward: the test accuracy to report: after the last step, or at the best evaluation on validation.

    Returns:
        The runs with `status` done or diverged, final_valid_nll = 1 - final_valid_reward and final_test_nll = 1 -
        `test_reward`. The LR is picked on the accuracy after the last step for both.
    """
    rl = runs[is_rl(runs)]
    return rl.assign(
        status=rl["status"].replace("unrewarded", "done"),
        final_valid_nll=1 - rl["final_valid_reward"].astype(float),
        final_test_nll=1 - rl[test_reward].astype(float),
    )


def reward_optima(runs: pd.DataFrame) -> pd.DataFrame:
    """The optimal LR of each arm by accuracy on validation, and the test accuracy there.

    Args:
        runs: columns run_id, ARM, lr, seed, task, status, final_valid_reward, final_reward.

    Returns:
        One row per arm as from `lr_optima` (lr_best, lr_opt, lr_low, lr_high, edge, resolved, n_runs, n_diverged,
        run_ids), with reward_opt (test accuracy at lr_opt, 0 to 1) for the loss there.

    Raises:
        UserError: see `check_runs`.
    """
    as_losses = errors(runs)
    found = lr_optima(as_losses, _noise(as_losses))
    # A parabola may pass below an error of 0.
    return found.assign(reward_opt=(1 - found["nll_opt"]).clip(0, 1)).drop(columns="nll_opt")


def _noise(as_losses: pd.DataFrame) -> pd.DataFrame:
    """Seed noise of error rates; none at all is not measured."""
    noise = seed_noise(as_losses)
    return noise.assign(**{name: noise[name].where(noise[name] > 0) for name in ("sigma", "sigma_valid")})


def reward_curves(
    runs: pd.DataFrame, curves: pd.DataFrame, split: str = "train", metric: str = "reward"
) -> pd.DataFrame:
    """A measure over training at each arm's best LR, that of the highest validation accuracy on the first seed's grid.

    Args:
        runs: columns as for `reward_optima`.
        curves: columns run_id, step, split, metric, value, and examples, which may be missing.
        split: of the curves: train, validation, test, or the name of a further problem set.
        metric: of the curves, as reward (train), accuracy (others), response_length.

    Returns:
        One row per arm and step, ascending: lr, step, episodes, mean and sd over the finished seeds that have the step
        (in the metric's unit; sd NaN with one seed), n_seeds, run_ids.

    Raises:
        UserError: see `check_runs`.
    """
    points = points_of(curves, split, metric).sort_values(["step", "run_id"])
    rows: list[dict[Hashable, Any]] = []
    for best in best_losses(errors(runs)).to_dict("records"):
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
    """The points of one measure: run_id, step, examples (null where not there) and value, which is never null."""
    columns = ["run_id", "step", "examples", "value"]
    if curves.empty:
        return pd.DataFrame(columns=columns)
    chosen = (curves["split"] == split) & (curves["metric"] == metric) & curves["value"].notna()
    return curves[chosen.astype(bool)].reindex(columns=columns)


def good_bands(runs: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How wide each arm's range of good LRs is: those with a test accuracy of at least `GOOD` of the arm's own peak.

    The peak is the test accuracy at the LR with the highest validation accuracy. Between LRs of the first seed's grid
    the accuracy is a straight line in log LR; that of a diverged run is 0. The width is the total length of all good
    pieces, so that one unlucky run does not cut off what lies beyond it.

    Args:
        runs: columns as for `reward_optima`.
        n_bootstrap: draws of the parametric bootstrap: each accuracy plus Gaussian seed noise.
        seed: of the bootstrap.

    Returns:
        One row per arm: lr_best, peak (accuracy), threshold (`GOOD` of it), width (decades of LR), width_low and
        width_high (95% interval; NaN without seed noise), step (widest spacing of the grid at good LRs, decades: about
        how far off straight lines may put the width), lr_low and lr_high (lowest and highest good LR), open_low and
        open_high (the lowest or highest LR of the grid is good, so that the width is a lower bound), n_runs,
        n_diverged, run_ids. NaN where no run finished or the peak is 0.

    Raises:
        UserError: see `check_runs`.
    """
    as_losses = errors(runs)
    check_runs(as_losses)
    noise = _noise(as_losses)
    rows = []
    for arm, of_arm in each_arm(as_losses):
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
    """Bootstrap draws of the width of one arm's range of good LRs; those of different arms are independent."""

    widths: np.ndarray
    """Decades of LR; NaN where `good_bands` has none."""
    open: np.ndarray
    """Whether the range reaches an edge of the grid, so that its width is a lower bound."""

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the width."""
        low, high = np.quantile(self.widths, [0.025, 0.975]).tolist()
        return low, high


def band_draws(of_arm: pd.DataFrame, noise: pd.DataFrame, n_bootstrap: int = 1000, seed: int = 0) -> BandDraws:
    """The draws behind an arm's interval in `good_bands`.

    Args:
        of_arm: the arm's runs as from `errors`.
        noise: as from `seed_noise` of such runs.
        n_bootstrap: number of draws.
        seed: of the bootstrap.
    """
    [(arm, _)] = each_arm(of_arm)
    grid = lr_grid(of_arm)
    sigmas = [sigma_of(noise, arm, split) for split in ("validation", "test")]
    if not _band(grid)["peak"] > 0 or not np.isfinite(sigmas).all():
        return BandDraws(np.full(n_bootstrap, math.nan), np.zeros(n_bootstrap, bool))
    rng = arm_rng(arm, seed)
    valid, test = (
        np.clip(1 - error + sigma * rng.standard_normal((n_bootstrap, len(grid.lr))), 0, 1)
        for error, sigma in zip((grid.valid, grid.test), sigmas, strict=True)
    )
    accuracy = np.where(grid.diverged, 0.0, test)
    threshold = GOOD * np.take_along_axis(test, np.nanargmax(valid, axis=1)[:, None], axis=1)
    lengths = _good_shares(accuracy, threshold) * np.diff(np.log10(grid.lr))
    return BandDraws(lengths.sum(axis=1), np.asarray((accuracy[:, [0, -1]] >= threshold).any(axis=1)))


def _band(grid: LrGrid) -> dict[str, Any]:
    """Peak and range of good LRs of one grid, as columns of `good_bands`."""
    numbers = ["lr_best", "peak", "threshold", "width", "step", "lr_low", "lr_high"]
    found: dict[str, Any] = dict.fromkeys(numbers, math.nan)
    found |= {"open_low": False, "open_high": False}
    best = best_index(grid)
    if best is None:
        return found
    peak = float(1 - grid.test[best])
    found |= {"lr_best": float(grid.lr[best]), "peak": peak, "threshold": GOOD * peak}
    if peak <= 0:
        return found
    log_lrs, accuracy = np.log10(grid.lr), np.where(grid.diverged, 0.0, 1 - grid.test)
    good = np.flatnonzero(accuracy >= GOOD * peak)
    first, last = int(good[0]), int(good[-1])
    steps = np.diff(log_lrs)
    shares = _good_shares(accuracy, np.array(GOOD * peak)) * steps
    low, high = log_lrs[first], log_lrs[last]
    # Below the first good LR of the grid and above the last, the line is good for a part of the way.
    low -= shares[first - 1] if first else 0.0
    high += shares[last] if last < len(shares) else 0.0
    found |= {"lr_low": float(10**low), "lr_high": float(10**high), "width": float(shares.sum())}
    found["step"] = float(steps[shares > 0].max(initial=0.0))
    return found | {"open_low": first == 0, "open_high": last == len(shares)}


def _good_shares(accuracy: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Share of each segment between neighbouring LRs on which the line is at least the threshold."""
    above = accuracy - threshold
    ends = np.stack([above[..., :-1], above[..., 1:]])
    lower, upper = ends.min(axis=0), ends.max(axis=0)
    part = np.clip(upper, 0, None) / np.where(upper > lower, upper - lower, 1.0)
    return np.where(lower >= 0, 1.0, part)
