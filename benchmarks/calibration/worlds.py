"""Made-up sweeps: the tidy tables of runs whose optima, minima and noise are known.

The loss of a run of an arm at a learning rate and with a seed is

    minimum + curvature x^2 exp(skew x) + (what its seed does),

with x = ln LR - ln optimal LR; `seeds` has the last part. On top of it each test example has a difficulty for all arms,
one for the arm, and one for the run, and each group of examples has one for the arm; the loss of the test split is the
mean over them. The first seed is trained at every LR of the grid, and further ones by the walk and the race of
`lorabench.runs`. `traits` says what else a world has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.calibration.made import MadeArm, MadeSweep
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.seeds import SeedEffects
from lorabench.runs import Condition, Lattice, Seeds, Sweep, finished_losses
from lorabench.store.tables import Tables

GRID_STEP = 10 ** (1 / 3)
"""The ratio of neighbouring LRs of a grid, as in sweeps with `lrs: auto`."""

TOKENS_PER_STEP = 1000
"""The number of tokens that a step trains on."""

GROUPS = 20
"""The number of groups in which test examples come; some are about ten times as large as others."""

FURTHER = 2
"""The largest number of LRs by which a grid is extended at either end."""

CLIFF = 10.0
"""How many times as fast as around its optimum a loss rises from its cliff on."""

_INTEGERS = ("rank", "batch_size", "steps", "seed", "train_tokens", "trainable_params", "hidden_size", "group_size")


def grid(optimum: float, random: np.random.Generator, n: int = 5) -> np.ndarray:
    """Return the LRs of a grid whose middle LR is the nearest to an optimum, which lies anywhere around it."""
    offset = random.uniform(-0.5, 0.5)
    return np.asarray(np.exp(optimum + math.log(GRID_STEP) * (np.arange(n) - (n - 1) // 2 + offset)))


class Rows:
    """The rows of the tables, collected by column."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.curves: list[pd.DataFrame] = []
        self.losses: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []
        self.groups: list[np.ndarray] = []

    def tables(self) -> Tables:
        runs = pd.DataFrame(self.runs)
        runs = runs.astype({name: "Int64" for name in _INTEGERS if name in runs})
        lengths = [len(loss) for loss in self.losses]
        test_losses = pd.DataFrame(
            {
                "run_id": np.repeat(runs["run_id"].to_numpy(object), lengths),
                "example": np.concatenate([np.arange(length) for length in lengths]),
                "loss": np.concatenate(self.losses),
                "tokens": np.concatenate(self.tokens),
                "group": np.concatenate(self.groups),
            }
        )
        return Tables(runs, pd.concat(self.curves, ignore_index=True), test_losses=test_losses)


def make_tables(sweeps: Sequence[MadeSweep], noise: NoiseLevels, random: np.random.Generator) -> Tables:
    """Draw the tables `runs`, `curves` and `test_losses` of supervised sweeps.

    Sweeps on one dataset share its test examples; a seed shuffles the data of each sweep differently.
    """
    rows = Rows()
    datasets: dict[Any, _Dataset] = {}
    for number, sweep in enumerate(sweeps):
        name = sweep.columns.get("dataset")
        if name not in datasets:
            n = sweep.test_examples
            datasets[name] = _Dataset(
                random.integers(10, 31, n).astype(float),
                groups_of(n, random),
                noise.example_common * random.standard_normal(n),
                noise.example_common * random.standard_normal() / math.sqrt(sweep.validation_examples),
            )
        _add_sweep(rows, number, sweep, noise, datasets[name], random)
    return rows.tables()


@dataclass(frozen=True)
class _Dataset:
    """The test examples of a dataset."""

    tokens: np.ndarray
    """The scored tokens of each example, (examples,)."""
    groups: np.ndarray
    """The number of each example's group, (examples,)."""
    common: np.ndarray
    """The difficulty of each example for all arms, in nats per token, (examples,)."""
    valid_common: float
    """The mean difficulty of the validation examples."""


def groups_of(n: int, random: np.random.Generator) -> np.ndarray:
    """Return the number of the group of each of n examples, (n,); the sizes of groups are log-normal."""
    sizes = np.exp(0.7 * random.standard_normal(GROUPS))
    return np.asarray(random.choice(GROUPS, n, p=sizes / sizes.sum()))


def _add_sweep(
    rows: Rows, number: int, sweep: MadeSweep, noise: NoiseLevels, dataset: _Dataset, random: np.random.Generator
) -> None:
    tokens, common, valid_common = dataset.tokens, dataset.common, dataset.valid_common
    weights = tokens / tokens.sum()
    seeds = max(arm.seeds for arm in sweep.arms)
    effects = SeedEffects(noise.seeds, seeds, random)
    lowest = sweep.arms[0].minimum
    last = int(sweep.columns.get("steps") or max([1, *sweep.curve_steps, *sweep.validation_steps]))
    steps = np.asarray(sweep.curve_steps, int)
    averaged = 1 / np.sqrt(np.diff(steps, prepend=0))
    batches = noise.batch * averaged * random.standard_normal((seeds, len(steps)))
    for arm_number, arm in enumerate(sweep.arms):
        lr, seed = cells(arm)
        x = np.log(lr) - arm.optimum
        excess = excess_loss(x, arm, noise)
        luck = effects.of_arm(arm.columns, x, seed, arm.curvature)
        level = arm.minimum + excess + luck
        valid_n = math.sqrt(sweep.validation_examples)
        valid = (
            level
            + valid_common
            + noise.example_arm / valid_n * random.standard_normal()
            + noise.example_run / valid_n * random.standard_normal(len(lr))
        )
        kept = kept_cells(arm, lr, seed, valid)
        lr, seed, level, valid, luck = (part[kept] for part in (lr, seed, level, valid, luck))
        of_group = sweep.group_sd * noise.margin * random.standard_normal(GROUPS)
        difficulty = (
            common
            + of_group[dataset.groups]
            + noise.example_arm * random.standard_normal(len(common))
            + noise.example_run * random.standard_normal((len(lr), len(common)))
        )
        losses = level[:, None] + difficulty
        run_ids = [f"{number}-{arm_number}-{i}" for i in range(len(lr))]
        fixed = {"status": "done", **sweep.columns, **arm.columns}
        test = losses @ weights
        rows.runs += [
            {"run_id": run_ids[i], **fixed, "lr": lr[i], "seed": seed[i], "final_valid_nll": valid[i]}
            | {"final_test_nll": test[i]}
            for i in range(len(lr))
        ]
        rows.losses += list(losses * tokens)
        rows.tokens += [tokens] * len(lr)
        rows.groups += [dataset.groups] * len(lr)
        curve = partial(_curve, arm, np.log(lr) - arm.optimum, luck, (lowest, last), noise)
        at = np.array([0, *sweep.validation_steps], int)
        split_noise = (valid - level)[:, None] + noise.seeds.run * random.standard_normal((len(lr), len(at)))
        # The validation examples are as hard for the base as for all arms.
        validation = curve(at) + np.where(at > 0, split_noise, valid_common)
        rows.curves.append(points(run_ids, at, "validation", "nll", validation))
        if len(steps):
            train = (
                curve(steps - 1) + batches[seed] + noise.step * averaged * random.standard_normal((len(lr), len(steps)))
            )
            rows.curves.append(points(run_ids, steps, "train", "nll", train))
        for metric, function in arm.metrics.items():
            values = np.array([function(steps) for _ in run_ids])
            rows.curves.append(points(run_ids, steps, "train", metric, values))


def _curve(
    arm: MadeArm, x: np.ndarray, luck: np.ndarray, ends: tuple[float, int], noise: NoiseLevels, steps: np.ndarray
) -> np.ndarray:
    """Return the loss of an arm's runs after some steps without the noise of these steps, (runs, steps).

    Args:
        x: the distance in ln LR of each run from the arm's optimum.
        luck: what seeds and chance do to each run at its end.
        ends: the loss of the sweep's first arm at the end, and the last step.
    """
    lowest, last = ends
    done = progress(steps, last)
    beyond = arm.curve(steps) if arm.curve else (arm.minimum - lowest) * done
    moved = arm.moved(steps) if arm.moved else 0.0
    own = luck[:, None] + excess_loss(x[:, None] - moved, arm, noise)
    late = arm.lag * last
    # A late arm is as far as the shared curve was some steps before; what is left of it at the end is in its minimum.
    lag = progress(steps, last) - progress(steps**2 / np.maximum(steps + late, 1), last)
    left = 1 - float(progress(np.array(last**2 / (last + late)), last))
    return np.asarray(lowest + noise.gain * (1 - done + lag - left * done) + beyond + own * done)


def excess_loss(x: np.ndarray, arm: MadeArm, noise: NoiseLevels) -> np.ndarray:
    """Return the rise of the loss at distances in ln LR from the optimum, in nats per token; at most to the base's."""
    skew = noise.asymmetry + arm.skew
    squares = x**2 * np.exp(skew * x) + CLIFF * np.maximum(x - arm.cliff, 0.0)
    return np.minimum(arm.curvature * noise.curvature * squares, noise.gain)


def cells(arm: MadeArm) -> tuple[np.ndarray, np.ndarray]:
    """Return LR and seed of every run that an arm could have: at its LRs, or at those that its walk may reach."""
    lrs = arm.lrs
    if lattice := _lattice(arm):
        below = len(lrs) // 2 + FURTHER
        lrs = np.array([lattice.lr(position) for position in range(-below, len(lrs) + 2 * FURTHER - below)])
    seed, lr = np.meshgrid(np.arange(arm.seeds), lrs, indexing="ij")
    return lr.ravel(), seed.ravel()


def _lattice(arm: MadeArm) -> Lattice | None:
    """Return the lattice of an arm that finds its LRs, with position 0 at the middle of its grid; else None."""
    scale = float(arm.lrs[len(arm.lrs) // 2])
    return Lattice(per_decade=3, further=FURTHER, scale=scale) if arm.repeats == "around" else None


def kept_cells(arm: MadeArm, lr: np.ndarray, seed: np.ndarray, valid: np.ndarray, is_rl: bool = False) -> np.ndarray:
    """Return which of them a real sweep trains, by their validation losses (in RL minus the accuracies)."""
    loss_of = dict(zip(zip(lr.tolist(), seed.tolist(), strict=True), valid.tolist(), strict=True))
    condition = Condition("rl" if is_rl else "sft", "", "", "lora", None, None, None, 1, 1, "")
    lattice, lrs = _lattice(arm), tuple(np.unique(lr).tolist())
    given = tuple((each, arm.seeds) for each in lrs) if arm.repeats == "every" else ()
    seeds = Seeds(arm.seeds, (arm.seeds_around or arm.seeds) if lattice else 1, given, racing=arm.racing)
    sweep = Sweep(condition, lrs[FURTHER:-FURTHER] if lattice else lrs, seeds, (), lattice)
    walked = finished_losses(sweep, lambda run: loss_of[run.lr, run.seed])
    return np.array([cell in walked for cell in loss_of])


def progress(steps: np.ndarray, last: int) -> np.ndarray:
    """Return the share of a run's fall of the loss after some steps: the loss falls with the log of the step."""
    return np.asarray(np.log1p(np.asarray(steps, float)) / math.log1p(last))


def points(run_ids: Sequence[str], steps: np.ndarray, split: str, metric: str, values: np.ndarray) -> pd.DataFrame:
    """Return rows of `curves` from values, (runs, steps)."""
    return pd.DataFrame(
        {
            "run_id": np.repeat(np.asarray(run_ids, object), len(steps)),
            "step": np.tile(steps, len(run_ids)),
            "tokens": np.tile(steps * TOKENS_PER_STEP, len(run_ids)),
            "split": split,
            "metric": metric,
            "value": values.ravel(),
        }
    )
