"""Runs that sweeps with `lrs: auto` need, against a fixed grid of the same resolution: a replay of finished sweeps.

    python -m benchmarks.lr_walk results/laptop/tables

The validation losses of each sweep's first seed are interpolated over ln LR, and seed noise of the measured size is
added, so that a walk may ask for any LR. The fixed grid holds as many points of the same lattice as bracket the optima
of all sweeps of its kind of training (SFT or RL), has further seeds at the best LR of the first seed, as a fixed grid
of a preset has, and is compared by the LR with the lowest loss in the mean over all its seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from lorabench.planning.plan import starting_lr
from lorabench.runs import Condition, Lattice, Seeds, Sweep, best_lr, ending, lowest, next_runs

_ARM = ["task", "model", "dataset", "method", "rank", "placement", "alpha", "batch_size", "steps", "init_a", "lr_ratio"]
_ARM += ["eps"]
LATTICE = Lattice(per_decade=3, further=6)
SEEDS = 3
DRAWS = 50
LEAST_LRS = 4


@dataclass(frozen=True)
class Replayed:
    """A finished sweep, and its interpolated validation loss as a function of the LR, without noise."""

    sweep: Sweep
    loss: Callable[[float], float]

    def optimum(self) -> float:
        """Return the lattice point with the lowest loss."""
        low, high = min(self.sweep.lrs), max(self.sweep.lrs)
        points = [LATTICE.lr(p) for p in range(-18, 1)]
        best = lowest({lr: self.loss(lr) for lr in points if low / 1e3 < lr < high * 1e3})
        assert best is not None
        return best


def replayed(runs: pd.DataFrame) -> Iterator[Replayed]:
    """Yield the sweeps of a table of runs that have at least `LEAST_LRS` LRs and a lowest loss inside of them."""
    for _, arm in runs[runs.seed == runs.seed.min()].groupby(_ARM, dropna=False):
        arm = arm.sort_values("lr")
        loss = arm.final_valid_nll.fillna(-arm.final_valid_reward)
        done = loss.notna().to_numpy()
        lrs, losses = arm.lr.to_numpy()[done], loss.to_numpy()[done]
        if len(lrs) < LEAST_LRS or lowest(dict(zip(lrs, losses, strict=True))) in (lrs[0], lrs[-1]):
            continue
        row = arm.iloc[0]
        task: Literal["sft", "rl"] = "rl" if row.task == "rl" else "sft"
        condition = Condition(
            task, row.model, row.dataset, row.method, None, None, None, int(row.batch_size), int(row.steps), ""
        )
        start = LATTICE.around(starting_lr(int(row.hidden_size), task))
        sweep = Sweep(condition, start, Seeds(SEEDS, SEEDS), (), lattice=LATTICE)
        yield Replayed(sweep, _interpolated(lrs, losses, float(arm.lr[~done].min())))


def _interpolated(lrs: np.ndarray, losses: np.ndarray, diverged: float) -> Callable[[float], float]:
    """Return the loss between measured LRs, beyond them along the end's slope, and infinite from a diverged LR on."""
    x = np.log(lrs)
    inside = PchipInterpolator(x, losses)
    slopes = (losses[1] - losses[0]) / (x[1] - x[0]), (losses[-1] - losses[-2]) / (x[-1] - x[-2])

    def loss(lr: float) -> float:
        at = math.log(lr)
        if lr >= diverged:
            return math.inf
        if at < x[0]:
            return float(losses[0] + slopes[0] * (at - x[0]))
        return float(losses[-1] + slopes[1] * (at - x[-1]) if at > x[-1] else inside(at))

    return loss


def seed_noise(runs: pd.DataFrame, task: str) -> float:
    """Return the pooled standard deviation of the validation loss over the seeds at the best LR of each arm."""
    runs = runs[(runs.task == task) & (runs.status == "done")]
    squares = freedom = 0.0
    for _, arm in runs.groupby(_ARM, dropna=False):
        first = arm[arm.seed == arm.seed.min()]
        if len(first) < LEAST_LRS:
            continue
        loss = arm.final_valid_nll.fillna(-arm.final_valid_reward)
        at_best = loss[arm.lr == lowest(dict(zip(first.lr, loss[first.index], strict=True)))]
        squares += float(((at_best - at_best.mean()) ** 2).sum())
        freedom += len(at_best) - 1
    return math.sqrt(squares / freedom)


Walk = tuple[int, int, bool, float, dict[float, float]]
"""The numbers of a walk's runs and LRs, whether it bracketed, its best LR, and mean losses at all lattice points."""


def walked(replay: Replayed, sigma: float, rng: np.random.Generator) -> Walk:
    """Walk once with seed noise of a standard deviation."""
    noise: dict[tuple[float, int], float] = {}

    def loss(lr: float, seed: int) -> float:
        return replay.loss(lr) + noise.setdefault((lr, seed), float(rng.normal(0, sigma)))

    losses: dict[tuple[float, int], float] = {}
    while wave := next_runs(replay.sweep, losses):
        losses |= {(run.lr, run.seed): loss(run.lr, run.seed) for run in wave}
    best = best_lr(replay.sweep, losses)
    assert best is not None
    means = {LATTICE.lr(p): fmean(loss(LATTICE.lr(p), s) for s in range(SEEDS)) for p in range(-18, 0)}
    bracketed = ending(replay.sweep, losses).startswith("bracketed")
    return len(losses), len({lr for lr, _ in losses}), bracketed, best, means


def main() -> None:
    """Print the numbers of a folder of tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", type=Path, help="the folder of a finished preset's tables")
    runs = pd.read_parquet(parser.parse_args().tables / "runs.parquet")
    rng = np.random.default_rng(0)
    for task in ("sft", "rl"):
        sweeps = [replay for replay in replayed(runs) if replay.sweep.condition.task == task]
        if not sweeps:
            continue
        sigma = seed_noise(runs, task)
        optima = [replay.optimum() for replay in sweeps]
        fixed_lrs = 3 + round(3 * math.log10(max(optima) / min(optima)))
        walks = [(replay, *walked(replay, sigma, rng)) for replay in sweeps for _ in range(DRAWS)]
        n_runs, n_lrs, bracketed = (np.array([walk[column] for walk in walks]) for column in (1, 2, 3))
        steps = [abs(3 * math.log10(best / (lowest(means) or math.nan))) for *_, best, means in walks]
        excess = [replay.loss(best) - replay.loss(optimum) for (replay, *_, best, _), optimum in
                  zip(walks, np.repeat(optima, DRAWS), strict=True)]  # fmt: skip
        print(
            f"{task}: {len(sweeps)} sweeps, {DRAWS} draws of noise each, sigma {sigma:.4f}\n"
            f"  LRs of a walk: mean {n_lrs.mean():.2f}, most {n_lrs.max()}; a fixed grid of all optima: {fixed_lrs}\n"
            f"  runs of a walk: mean {n_runs.mean():.2f}, most {n_runs.max()}; "
            f"fixed with {SEEDS} seeds at one LR: {fixed_lrs + SEEDS - 1}, "
            f"at three: {fixed_lrs + 3 * (SEEDS - 1)}, at all: {fixed_lrs * SEEDS}\n"
            f"  bracketed: {bracketed.mean():.1%}\n"
            f"  LR of the dense grid (lowest mean of {SEEDS} seeds at every LR): "
            f"equal {np.mean(np.array(steps) < 0.3):.1%}, within a step {np.mean(np.array(steps) < 1.3):.1%}\n"
            f"  true loss above that of the best lattice point: mean {np.mean(excess):.4f}, largest {max(excess):.4f}"
        )


if __name__ == "__main__":
    main()
