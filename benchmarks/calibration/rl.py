"""Made-up sweeps of reinforcement learning (RL), whose losses are error rates on problems, and their scenes.

A problem is solved or not, so a run's error rate sets how many of the test problems it fails, and the problems' own
difficulties say which: problems are ordered by a difficulty for all arms, one for the arm and one for the run.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.special import ndtr, ndtri

from benchmarks.calibration.made import Curve, MadeRl
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.scenes import FULLFT, LR_MARGIN, SHAPE, TEN, lora, made_arm, sign
from benchmarks.calibration.seeds import SeedEffects
from benchmarks.calibration.worlds import GROUPS, Rows, cells, groups_of, kept_cells, points, progress
from lorabench.analysis.rewards import FAR, NEAR
from lorabench.claims.reinforcement import CHEAPER
from lorabench.store.tables import Tables


def make_rl_tables(sweep: MadeRl, noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Draw the tables `runs`, `curves` and `test_losses` of a sweep of RL."""
    rows = Rows()
    sets = {"test": sweep.test_examples, "validation": sweep.validation_examples, **sweep.held_out}
    common = {name: random.standard_normal(n) for name, n in sets.items()}
    groups = {name: groups_of(n, random) for name, n in sets.items()}
    seeds = max(arm.seeds for arm in sweep.arms)
    effects = SeedEffects(noise.rl_seeds, seeds, random)
    steps = np.arange(1, sweep.steps + 1)
    batches = noise.rl_batch * random.standard_normal((seeds, len(steps)))
    for number, arm in enumerate(sweep.arms):
        lr, seed = cells(arm)
        x = np.log(lr) - arm.optimum
        luck = effects.of_arm(arm.columns, x, seed)
        excess = arm.curvature * noise.rl_curvature * x**2 * np.exp(arm.skew * x)
        error = np.clip(arm.minimum + excess + luck, 0.01, 1 - noise.rl_base)
        # Difficulties have an SD of 1 over problems. Where about half of these fail, a group that is harder by a small
        # amount fails 0.4 times that amount more often.
        of_group = sweep.group_sd * noise.rl_margin / 0.4
        hardness = {name: common[name] + of_group * random.standard_normal(GROUPS)[groups[name]] for name in sets}
        validation = _failed(error, hardness["validation"], noise, random)
        kept = kept_cells(arm, lr, seed, validation.mean(1) - 1, is_rl=True)
        lr, seed, error, luck = lr[kept], seed[kept], error[kept], luck[kept]
        failed = {name: _failed(error, hardness[name], noise, random) for name in sets if name != "validation"}
        failed["validation"] = validation[kept]
        accuracy = {name: 1 - by_problem.mean(1) for name, by_problem in failed.items()}
        run_ids = [f"rl-{number}-{i}" for i in range(len(lr))]
        fixed = {"task": "rl", "status": "done", "base_reward": noise.rl_base, "steps": sweep.steps}
        fixed |= {"constant_reward": 0.0, "rule_reward": 0.0}
        rows.runs += [
            {"run_id": run_id, **fixed, **sweep.columns, **arm.columns, "lr": lr[i], "seed": seed[i]}
            | {"final_valid_reward": accuracy["validation"][i]}
            | {"final_reward": accuracy["test"][i], "best_reward": accuracy["test"][i]}
            for i, run_id in enumerate(run_ids)
        ]
        rows.losses += list(failed["test"].astype(float))
        rows.tokens += [np.ones(sweep.test_examples)] * len(lr)
        rows.groups += [groups["test"]] * len(lr)
        done = progress(steps - 1, sweep.steps)
        reward = noise.rl_base + (1 - error - noise.rl_base)[:, None] * done
        if arm.curve is not None:
            reward = noise.rl_base + (noise.rl_tuned - noise.rl_base) * done + arm.curve(steps)
            reward = reward - luck[:, None] * done
        reward = reward + batches[seed] + noise.rl_step * random.standard_normal(reward.shape)
        rows.curves.append(points(run_ids, steps, "train", "reward", np.clip(reward, 0, 1)))
        ends = np.array([0, sweep.steps])
        for name, n in sets.items():
            by_problem = np.stack([np.full(len(lr), noise.rl_base), accuracy[name]], axis=1)
            rows.curves.append(points(run_ids, ends, name, "accuracy", by_problem))
            for count in ("n_samples", "n_problems"):
                rows.curves.append(points(run_ids, ends, name, count, np.full((len(lr), 2), float(n))))
        if number in sweep.lengths:
            spread = np.exp(0.05 * random.standard_normal((len(lr), len(steps))))
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


_RL = {"model": "made-up", "dataset": "problems", "batch_size": 640, "family": "llama", "hidden_size": 128}

LENGTH = 360.0
"""The mean length of responses at the end, twice that at first; in tokens. On average it meets the setting of F5."""


def _length(final: float = LENGTH) -> Curve:
    """Return a mean length of responses that grows from LENGTH / 2."""
    return lambda steps: np.exp(np.interp(steps, [5, 45], [math.log(LENGTH / 2), math.log(final)]))


def rl(k: float, noise: NoiseLevels, random: np.random.Generator) -> MadeRl:
    """Return a sweep of RL with FullFT and ranks 1 and 64.

    Rank 1 has an error rate k margins above FullFT's, so on a held-out set as well, and responses longer or shorter by
    a factor of 1.25 to the k. The training reward of rank 64 is k margins off FullFT's. Its ratio of optimal LRs is k
    margins off 10.
    """
    optimum, error, margin = math.log(2e-4) + random.uniform(-0.5, 0.5), 1 - noise.rl_tuned, noise.rl_margin
    apart, ratio = sign(random) * k * margin, sign(random) * k * LR_MARGIN
    arms = [
        made_arm(FULLFT, optimum, error, random, seeds=5, n_lrs=6, curve=np.zeros_like),
        made_arm(lora(1), optimum + TEN, error + k * margin, random, seeds=5, n_lrs=6, curve=np.zeros_like),
        made_arm(lora(64), optimum + TEN + ratio, error, random, seeds=5, n_lrs=6, curve=lambda at: 0.0 * at + apart),
    ]
    longer = LENGTH * 1.25 ** (sign(random) * k)
    return MadeRl(arms, _RL, held_out={"aime24": 480}, lengths={0: _length(), 1: _length(longer), 2: _length()})


def rl_ranges(k: float, noise: NoiseLevels, random: np.random.Generator) -> MadeRl:
    """Return a sweep of RL in which a missed LR costs LoRA k margins less of its accuracy than FullFT."""
    optimum, error = math.log(2e-4) + random.uniform(-0.5, 0.5), 1 - noise.rl_tuned
    # The mean loss of accuracy over LRs at a distance of a to b, of a parabola with curvature 1.
    near, far = (TEN**2 * (b**3 - a**3) / (b - a) / 3 for a, b in ((0, NEAR), (NEAR, FAR)))
    cost = 1 - (noise.rl_tuned - noise.rl_curvature * far) / (noise.rl_tuned - noise.rl_curvature * near)
    cheaper = cost - k * CHEAPER
    flatter = cheaper * noise.rl_tuned / (far - (1 - cheaper) * near) / noise.rl_curvature
    arms = [
        made_arm(FULLFT, optimum, error, random, seeds=5, n_lrs=6),
        replace(made_arm(lora(1), optimum + TEN, error, random, seeds=5, n_lrs=7), curvature=flatter),
    ]
    return MadeRl(arms, _RL, lengths=dict.fromkeys(range(2), _length()), without=SHAPE)


def rl_placements(k: float, noise: NoiseLevels, random: np.random.Generator) -> MadeRl:
    """Return a sweep of RL in which LoRA on attention alone has an error rate k margins above that on the MLP."""
    optimum, error, margin = math.log(2e-4) + random.uniform(-0.5, 0.5), 1 - noise.rl_tuned, noise.rl_margin
    at = optimum + TEN
    arms = [
        made_arm(FULLFT, optimum, error, random, seeds=5, n_lrs=6),
        made_arm(lora(64, trainable_params=100_000), at, error, random, seeds=5, n_lrs=6),
        made_arm(lora(64, "attn", trainable_params=40_000), at, error + k * margin, random, seeds=5, n_lrs=6),
        made_arm(lora(52, "mlp", trainable_params=40_000), at, error, random, seeds=5, n_lrs=6),
        made_arm(lora(64, "mlp", trainable_params=50_000), at, error, random, seeds=5, n_lrs=6),
    ]
    return MadeRl(arms, _RL, lengths=dict.fromkeys(range(5), _length()))
