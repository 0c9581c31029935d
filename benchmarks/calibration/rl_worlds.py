"""Made-up sweeps of reinforcement learning (RL), whose losses are error rates on problems.

A problem is solved or not, so a run's error rate sets how many of the test problems it fails, and the problems' own
difficulties say which: problems are ordered by a difficulty for all arms, one for the arm and one for the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from benchmarks.calibration.design import as_designed, current
from benchmarks.calibration.made import MadeArm
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.worlds import Rows, cells, kept_cells, points, progress
from lorabench.store.tables import Tables


@dataclass(frozen=True)
class MadeRl:
    """The arms of one comparison of RL, with their lowest error rates as minima."""

    arms: Sequence[MadeArm]
    columns: Mapping[str, Any]
    """Values of `runs` that all arms share."""
    steps: int = 50
    test_problems: int = 160
    validation_problems: int = 64
    held_out: Mapping[str, int] = field(default_factory=dict)
    """The number of problems of further sets; their error rates are those of the test split."""
    lengths: Mapping[int, Callable[[np.ndarray], np.ndarray]] = field(default_factory=dict)
    """The mean length of responses by step, by the arm's position in `arms`."""


def make_rl_tables(sweep: MadeRl, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Draw the tables `runs`, `curves` and `test_losses` of a sweep of RL."""
    if (design := current()) is not None:
        sweep = replace(
            sweep,
            arms=as_designed(design, sweep.arms, random),
            test_problems=design.test_examples,
            validation_problems=design.validation_examples,
        )
    rows = Rows()
    sets = {"test": sweep.test_problems, "validation": sweep.validation_problems, **sweep.held_out}
    common = {name: random.standard_normal(n) for name, n in sets.items()}
    seeds = max(arm.seeds for arm in sweep.arms)
    shared = noise.rl_shared_seed * random.standard_normal(seeds)
    steps = np.arange(1, sweep.steps + 1)
    batches = noise.rl_batch * random.standard_normal((seeds, len(steps)))
    for number, arm in enumerate(sweep.arms):
        lr, seed = cells(arm)
        x = np.log(lr) - arm.optimum
        of_arm = noise.rl_arm_seed * random.standard_normal(seeds)
        luck = shared[seed] + of_arm[seed] + noise.rl_run * random.standard_normal(len(lr))
        error = np.clip(arm.minimum + arm.curvature * noise.rl_curvature * x**2 + luck, 0.01, 1 - noise.rl_base)
        failed = {name: _failed(error, common[name], noise, random) for name in sets}
        kept = kept_cells(arm, lr, seed, failed["validation"].mean(1))
        lr, seed, error = lr[kept], seed[kept], error[kept]
        accuracy = {name: 1 - of_set[kept].mean(1) for name, of_set in failed.items()}
        run_ids = [f"rl-{number}-{i}" for i in range(len(lr))]
        fixed = {"task": "rl", "status": "done", "base_reward": noise.rl_base, "steps": sweep.steps}
        fixed |= {"constant_reward": 0.0, "rule_reward": 0.0}
        rows.runs += [
            {"run_id": run_id, **fixed, **sweep.columns, **arm.columns, "lr": lr[i], "seed": seed[i]}
            | {"final_valid_reward": accuracy["validation"][i]}
            | {"final_reward": accuracy["test"][i], "best_reward": accuracy["test"][i]}
            for i, run_id in enumerate(run_ids)
        ]
        rows.losses += list(failed["test"][kept].astype(float))
        rows.tokens += [np.ones(sweep.test_problems)] * len(lr)
        done = progress(steps - 1, sweep.steps)
        reward = noise.rl_base + (1 - error - noise.rl_base)[:, None] * done
        if arm.curve is not None:
            reward = noise.rl_base + (noise.rl_tuned - noise.rl_base) * done + arm.curve(steps)
            reward = reward - luck[kept][:, None] * done
        reward = reward + batches[seed] + noise.rl_step * random.standard_normal(reward.shape)
        rows.curves.append(points(run_ids, steps, "train", "reward", np.clip(reward, 0, 1)))
        ends = np.array([0, sweep.steps])
        for name, n in sets.items():
            of_set = np.stack([np.full(len(lr), noise.rl_base), accuracy[name]], axis=1)
            rows.curves.append(points(run_ids, ends, name, "accuracy", of_set))
            for count in ("n_samples", "n_problems"):
                rows.curves.append(points(run_ids, ends, name, count, np.full((len(lr), 2), float(n))))
        if number in sweep.lengths:
            spread = np.exp(0.05 * random.standard_normal((len(lr), len(steps))) + 0.03 * of_arm[seed][:, None])
            rows.curves.append(
                points(run_ids, steps, "train", "response_length", sweep.lengths[number](steps) * spread)
            )
            rows.curves.append(points(run_ids, steps, "train", "truncated", np.zeros((len(lr), len(steps)))))
    return rows.tables()


def _failed(error: np.ndarray, common: np.ndarray, noise: NoiseLevels, random: np.random.Generator) -> np.ndarray:
    """Return which problems runs fail, (runs, problems): those whose difficulty, a normal variable, is the highest."""
    shares = [noise.rl_problem_common, noise.rl_problem_arm, 1 - noise.rl_problem_common - noise.rl_problem_arm]
    difficulty = (
        np.sqrt(shares[0]) * common
        + np.sqrt(shares[1]) * random.standard_normal(len(common))
        + np.sqrt(shares[2]) * random.standard_normal((len(error), len(common)))
    )
    return np.asarray(ndtr(difficulty) > ndtr(ndtri(1 - error))[:, None])
