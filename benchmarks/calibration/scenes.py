"""Scenes: the made-up sweeps that claims are judged on, with an effect of a size that is given in margins.

An effect of size k stands k margins away from 0, where a claim of equality is true and a claim of a difference is
false. Each function takes k, the noise and a random generator. Where a claim is judged on several comparisons, one of
them has the effect and the others hold for certain, which makes a wrong confirmation most likely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.calibration.made import Curve, MadeArm, MadeRl, MadeSweep, Metric
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.worlds import grid
from lorabench.analysis.arms import ALPHA
from lorabench.claims.learning_rate import (
    GROWTH,
    LEAST_SHIFT,
    MAX_EXPONENT_DISTANCE,
    MAX_REGRET,
    SHORT_RATIO,
    same_factor,
)
from lorabench.claims.parametrization import HALF, MAJORITY
from lorabench.config.margins import DEFAULT_MARGINS
from studies.lr_ratio.predictions import DEFAULT
from studies.lr_ratio.theories import Setting, converted_lr

Scene = Callable[[float, NoiseLevels, np.random.Generator], list[MadeSweep] | MadeRl]
"""Makes sweeps with an effect of so many margins."""

FULLFT: dict[str, Any] = {"method": "fullft"}

LR_MARGIN = math.log(DEFAULT_MARGINS.lr_factor)
"""The margin of ratios of optimal LRs, as a natural logarithm."""

TEN = math.log(10.0)

SHAPE = ("curvatures", "asymmetry", "cliff")
"""The traits that a world is without where the rise of the loss around the optimum is what the claim is about."""

RUN: dict[str, Any] = {"model": "made-up", "dataset": "worked", "batch_size": 8, "steps": 1000}
RUN |= {"family": "llama", "hidden_size": 128}


def lora(rank: int, placement: str = "all", **columns: Any) -> dict[str, Any]:
    """Return the columns of a LoRA arm in the standard parametrization."""
    standard = {"alpha": 32.0, "init_a": 1.0, "lr_ratio": 1.0, "trainable_params": 1000 * rank}
    return {"method": "lora", "rank": rank, "placement": placement, **standard, **columns}


def sign(random: np.random.Generator) -> int:
    """Return 1 or -1, for an effect that may have either sign."""
    return int(random.choice([-1, 1]))


def an_optimum(random: np.random.Generator) -> float:
    """Return the optimum of full fine-tuning, as ln LR."""
    return math.log(6e-4) + random.uniform(-0.5, 0.5)


def made_arm(
    columns: Mapping[str, Any],
    optimum: float,
    minimum: float,
    random: np.random.Generator,
    seeds: int = 3,
    n_lrs: int = 5,
    curve: Curve | None = None,
) -> MadeArm:
    """Return an arm of a sweep that finds its LRs, with a grid around its optimum."""
    return MadeArm(columns, optimum, minimum, grid(optimum, random, n_lrs), seeds, "around", curve=curve)


def ranks(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return a sweep of FullFT and LoRA ranks.

    The highest rank's loss and its LR ratio to FullFT are k margins off, and so are rank 4's optimal LR from that of
    higher ranks and that of rank 1 below theirs. Rank 1's share of layers in which B has the larger norm is 0.1 k above
    a half.
    """
    optimum, margin = an_optimum(random), noise.margin

    def b_over_a(margins: float) -> Mapping[str, Metric]:
        return {"b_over_a": lambda steps: HALF + MAJORITY * margins + 0.05 * random.standard_normal(len(steps))}

    high = optimum + TEN + sign(random) * k * LR_MARGIN
    rank_4 = high + sign(random) * k * math.log(same_factor(4, 64))
    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, seeds=6),
        made_arm(lora(64), high, noise.loss + sign(random) * k * margin, random, seeds=6),
        made_arm(lora(16), high, noise.loss, random),
        made_arm(lora(4), rank_4, noise.loss, random),
        made_arm(lora(1), high - k * math.log(LEAST_SHIFT), noise.loss + k * margin, random, n_lrs=6),
    ]
    with_norms = [arms[0], *(replace(arm, metrics=b_over_a(2)) for arm in arms[1:-1])]
    with_norms.append(replace(arms[-1], metrics=b_over_a(k)))
    return [MadeSweep(with_norms, RUN, curve_steps=(1000,))]


def two_datasets(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return a sweep on two datasets: the highest rank is 2 margins better on one, and k margins worse on another."""
    sweeps = []
    for dataset, gap in (("instruct", -2.0), ("worked", k)):
        optimum = an_optimum(random)
        arms = [
            made_arm(FULLFT, optimum, noise.loss, random, seeds=6),
            made_arm(lora(64), optimum + TEN, noise.loss + gap * noise.margin, random, seeds=6),
        ]
        sweeps.append(MadeSweep(arms, {**RUN, "dataset": dataset}))
    return sweeps


def batch_sizes(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return sweeps at batch sizes 8, 32 and 128 on one pass over the same data, with seeds at three LRs each.

    From the smallest to the largest batch size, FullFT's loss and the gap of the lower rank grow by k margins, and the
    gap of the higher rank by k more. Along the runs, the gap at the largest is 4 margins; at the smallest it ends at 0,
    from k margins halfway for one rank, and from 3 for the other.
    """
    optimum, margin = an_optimum(random), noise.margin
    sweeps = []
    for number, (batch_size, steps) in enumerate(((8, 960), (32, 240), (128, 60))):
        at = optimum + 0.5 * number
        lowest = noise.loss + (k * margin if number == 2 else 0.0)
        gap = k * margin if number == 2 else 0.0
        along = [(4.0, 4.0), (4.0, 4.0)] if number == 2 else [(3.0, 0.0), (k, 0.0)]
        curves = [_two_levels(early * margin, late * margin, steps) for early, late in along]
        arms = [
            made_arm(FULLFT, at, lowest, random, seeds=5, curve=_two_levels(0.0, 0.0, steps)),
            made_arm(lora(16), at + TEN, lowest + gap, random, seeds=5, curve=curves[0]),
            made_arm(lora(64), at + TEN, lowest + 2 * gap, random, seeds=5, curve=curves[1]),
        ]
        columns = {**RUN, "batch_size": batch_size, "steps": steps}
        sweeps.append(MadeSweep(arms, columns, curve_steps=range(steps // 60, steps + 1, steps // 60)))
    return sweeps


def _two_levels(early: float, late: float, steps: int) -> Curve:
    """Return a gap of one size in the first 60% of a run and another from there on."""
    return lambda at: np.where(at <= 0.6 * steps, early, late)


def placements(
    k: float, noise: NoiseLevels, random: np.random.Generator, family: str = "llama", mlp: float = 0.0
) -> list[MadeSweep]:
    """Return a sweep of LoRA on all layers, on attention and on the MLP, which is `mlp` margins worse than all layers.

    Attention alone is k margins worse than the MLP at an equal number of parameters.
    """
    optimum, margin = an_optimum(random), noise.margin
    at, mlp_loss = optimum + TEN, noise.loss + mlp * margin
    arms = [
        made_arm(FULLFT, optimum, noise.loss, random),
        made_arm(lora(64, trainable_params=100_000), at, noise.loss, random, seeds=5),
        made_arm(lora(64, "attn", trainable_params=40_000), at, mlp_loss + k * margin, random, seeds=5),
        made_arm(lora(52, "mlp", trainable_params=40_000), at, mlp_loss, random, seeds=5),
        made_arm(lora(64, "mlp", trainable_params=50_000), at, mlp_loss, random, seeds=5),
    ]
    return [MadeSweep(arms, {**RUN, "steps": 100, "family": family})]


def mlp_alone(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return placements whose MLP alone is k margins worse than all layers."""
    return placements(2, noise, random, mlp=k)


def experts(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return placements of a mixture of experts."""
    return placements(k, noise, random, family="qwen3_moe")


def variants(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return a sweep of LoRA in the standard parametrization and in variants, one of which is better by k margins."""
    optimum, margin = an_optimum(random) + TEN, noise.margin
    others = [(8.0, 1.0, 0.0), (128.0, 1.0, 0.0), (32.0, 4.0, 0.0), (32.0, 16.0, -k)]
    arms = [made_arm(FULLFT, optimum - TEN, noise.loss, random), made_arm(lora(16), optimum, noise.loss, random)]
    for alpha, ratio, gap in others:
        shift = math.log(32.0 / alpha / ratio)
        columns = lora(16, alpha=alpha, lr_ratio=ratio)
        arms.append(made_arm(columns, optimum + shift, noise.loss + gap * margin, random))
    return [MadeSweep(arms, RUN)]


def _beside_lora(
    random: np.random.Generator, noise: NoiseLevels, dora: Mapping[str, float], rslora_off: float = 0.0, **sweep: Any
) -> list[MadeSweep]:
    """Return a sweep of FullFT, LoRA, rsLoRA and DoRA, with three seeds at the three LRs around the best one.

    Args:
        dora: what DoRA has that LoRA has not: `lr`, how far ln of its optimal LR lies above that of LoRA; `loss`, how
            far its lowest loss lies above; and `curvature`, over that of LoRA.
        rslora_off: how far ln of rsLoRA's optimal LR lies above what `movement` predicts.
        sweep: further fields of the sweep.
    """
    optimum, movement = an_optimum(random), DEFAULT.movement
    assert movement is not None, "a default prediction"
    lr, setting = math.exp(optimum + TEN), Setting(RUN["hidden_size"], RUN["steps"], RUN["batch_size"], ALPHA, rank=16)
    at_rslora = math.log(converted_lr(lr, setting, replace(setting, alpha=4 * ALPHA), movement)) + rslora_off
    arms = [
        made_arm(FULLFT, optimum, noise.loss, random),
        made_arm(lora(16), optimum + TEN, noise.loss, random),
        made_arm(lora(16, alpha=4 * ALPHA), at_rslora, noise.loss, random),
    ]
    at_dora, lowest = optimum + TEN + dora.get("lr", 0.0), noise.loss + dora.get("loss", 0.0)
    made = made_arm({**lora(16), "method": "dora"}, at_dora, lowest, random)
    arms.append(replace(made, curvature=dora.get("curvature", 1.0)))
    return [MadeSweep(arms, RUN, **sweep)]


def beside_lora(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return variants of LoRA: DoRA is better by k margins, and its optimal LR and rsLoRA's are k margins off."""
    dora = {"loss": -k * noise.margin, "lr": sign(random) * k * LR_MARGIN}
    return _beside_lora(random, noise, dora, sign(random) * k * LR_MARGIN)


def wider(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return variants of LoRA of which DoRA has a range of good LRs that is wider by k margins."""
    return _beside_lora(random, noise, {"curvature": math.exp(-2 * k * LR_MARGIN)}, without=SHAPE)


def lengths(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return runs of 1,000 steps in which the ratio of optimal LRs is 15 up to step 100 and k margins lower at the end.

    The margin is a factor of the square root of 1.5.
    """
    optimum, fall = an_optimum(random), k * math.log(GROWTH)
    at = optimum + math.log(SHORT_RATIO) - fall

    def moved(steps: np.ndarray) -> np.ndarray:
        return np.where(steps <= 100, fall, 0.0)

    arms = [
        made_arm(FULLFT, optimum, noise.loss, random, seeds=6),
        replace(made_arm(lora(64), at, noise.loss, random, seeds=6), moved=moved),
    ]
    sweep = MadeSweep(arms, {**RUN, "steps": 1000}, validation_steps=(50, 100, 1000))
    return [sweep]


_WIDTHS = (("llama", 1024), ("llama", 2048), ("llama", 4096), ("qwen3", 1024), ("qwen3", 4096))
"""Family and hidden size of the models of a law of LRs."""


def _models(
    models: Sequence[tuple[str, int]],
    log_lrs: Sequence[tuple[float, float]],
    noise: NoiseLevels,
    random: np.random.Generator,
) -> list[MadeSweep]:
    """Return sweeps of models with given optima of FullFT and of LoRA, in ln LR."""
    sweeps = []
    for (family, width), (fullft_lr, lora_lr) in zip(models, log_lrs, strict=True):
        arms = [
            made_arm(FULLFT, fullft_lr, noise.loss, random, seeds=5),
            made_arm(lora(16), lora_lr, noise.loss, random, seeds=5),
        ]
        columns = {**RUN, "model": f"{family}-{width}", "family": family, "hidden_size": width}
        sweeps.append(MadeSweep(arms, columns))
    return sweeps


def models(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return sweeps of four models, one of which has a ratio of optimal LRs that is k margins off the mean of all."""
    # A model that is off by 4/3 moves the mean by 1/3.
    apart = sign(random) * k * LR_MARGIN * 4 / 3
    optimum = an_optimum(random)
    log_lrs = [(optimum, optimum + TEN + (apart if number == 0 else 0.0)) for number in range(4)]
    return _models([*_WIDTHS[:2], *_WIDTHS[3:]], log_lrs, noise, random)


def law(k: float, noise: NoiseLevels, random: np.random.Generator) -> list[MadeSweep]:
    """Return sweeps of five models whose optimal LRs follow the published law, but for two effects.

    The middle model of one family is off the law, so that the law fitted to all has k times the regret of 0.5% of the
    loss. The exponent of the other family is off by k times 0.3.
    """
    exponents = {"llama": 0.781, "qwen3": 0.075 + sign(random) * k * MAX_EXPONENT_DISTANCE}
    # What a law with one base leaves of a model that is off by 1, as a sum of squares over the models.
    z = np.array([math.log(2000 / width) for _, width in _WIDTHS])
    is_llama = np.array([family == "llama" for family, _ in _WIDTHS])
    design, off = np.column_stack([np.ones_like(z), z * is_llama, z * ~is_llama]), np.eye(len(z))[1]
    left = off - design @ np.linalg.lstsq(design, off, rcond=None)[0]
    steepness = noise.curvature / noise.loss
    apart = sign(random) * math.sqrt(MAX_REGRET * k * len(z) / steepness / float(left @ left))
    log_lrs = []
    for number, (family, width) in enumerate(_WIDTHS):
        fullft_lr = math.log(5e-5) + exponents[family] * math.log(2000 / width) + (apart if number == 1 else 0.0)
        log_lrs.append((fullft_lr, fullft_lr + TEN))
    # The curvature says what being off the law costs.
    return [replace(sweep, without=SHAPE) for sweep in _models(_WIDTHS, log_lrs, noise, random)]
