"""Findings about alpha and its variants, length, batch size and precision, and about runs that differ in one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from statistics import NormalDist

import numpy as np

from lora_advice import formats
from lora_advice.audit.config import Knowledge, TrainingConfig
from lora_advice.finding import Finding, Level
from lora_advice.variants import VARIANT_NAMES, lr_factor

ALPHA = 32.0
"""The paper's alpha at every rank."""

ALPHAS = (2.0, 512.0)
"""The optimal learning rate is measured here from alpha 8 to 128; beyond a further factor of 4 nothing is known."""

SHORT = 100
"""The paper gives another ratio of learning rates for runs of fewer steps."""

LARGE_BATCH = 256

ALPHA_EXPONENTS = (0.5, 0.75, 1.0)
"""The optimal LR goes as alpha to minus this: while A moves freely, the middle, and while A stands still."""

FAR = 10.0
"""The factor between two learning rates of the same setting from which one of them must be wrong."""

# Preference training is several tasks, such as DPO and reward models, with learning rates of their own.
_COMPARED = ("sft", "rl")

RATIO, RATIO_LOW, RATIO_HIGH = 14, 3.2, 61
"""LoRA's optimal learning rate over that of full fine-tuning, with its 95% interval, over all sources."""

_THEORY = "the theory of the ratio, studies/lr_ratio/README.md"
_RATIO = "optima of 6 sources, docs/other-runs.md"
_MOST, _FEW = 0.8, 0.05
"""The shares of steps kept in bf16 above which nothing is said, and below which little is learned."""
_TYPICAL_WEIGHT = 0.02
"""The standard deviation of the weights of large language models, roughly."""


def kept_in_bf16(lr: float, size: float = _TYPICAL_WEIGHT) -> float:
    """Return the share of steps of size `lr` that is left if weights are rounded to bf16, which has 8 significant bits.

    Args:
        lr: the learning rate; a step of Adam is about as large.
        size: the standard deviation of the weights, which are taken to be normal.
    """
    weights = np.array([NormalDist(0, size).inv_cdf(0.5 + (place + 0.5) / 1000) for place in range(500)])
    spacing = 2.0 ** (np.floor(np.log2(weights)) - 7)
    return float(np.mean(np.round(lr / spacing) * spacing) / lr)


def effective_alpha(config: TrainingConfig) -> float | None:
    """Return the alpha by which alpha / rank scales LoRA as much as it is; null if that is not known or not above 0."""
    if config.alpha is None or not 0 < config.alpha < math.inf:
        return None
    if not config.rslora:
        return config.alpha
    return config.alpha * math.sqrt(config.rank) if config.rank and config.rank > 0 else None


def _moved(alpha: float, to: float) -> str:
    """Return in words by what factor the optimal learning rate moves from one alpha to another."""
    low, middle, high = (max(alpha / to, to / alpha) ** exponent for exponent in ALPHA_EXPONENTS)
    return f"{middle:.2g} ({low:.2g} to {high:.2g}) times {'lower' if to > alpha else 'higher'}"


def check_scale(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what is odd about LoRA's scale: none at all, or an extreme alpha."""
    if config.method != "lora":
        return []
    line = config.line("alpha", "rank")
    if config.alpha == 0 or config.rank == 0:
        what = "alpha" if config.alpha == 0 else "rank"
        return [
            Finding("scale", "error", f"with {what} 0 LoRA changes nothing", "the file alone", "certain", line=line)
        ]
    alpha = effective_alpha(config)
    if not alpha or config.rslora or ALPHAS[0] <= alpha <= ALPHAS[1]:
        return []
    message = (
        f"alpha {alpha:g} is far from the paper's 32, for which learning rates are recommended: the optimal one is "
        f"{_moved(ALPHA, alpha)}"
    )
    return [Finding("scale", "note", message, _THEORY, "far beyond all values measured", line=line)]


def check_variants(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what is known of the best learning rate of each variant of LoRA that a run with a learning rate uses."""
    findings = []
    for variant in config.variants if config.lr else ():
        name, source, sure = VARIANT_NAMES[variant], _THEORY, "the scale is certain; the factor is between two theories"
        alpha, scale = config.alpha, effective_alpha(config)
        if variant == "rslora":
            if not alpha or not scale:
                continue
            message = (
                f"rsLoRA divides alpha {alpha:g} by the square root of rank {config.rank}, which is as alpha "
                f"{formats.number(scale)} without it: the optimal learning rate is {_moved(alpha, scale)}"
            )
        elif variant == "lora_plus":
            ratio = config.lr_ratio or 1.0
            message = (
                f"LoRA+ gives B {ratio:g} times the learning rate of A, which is as {ratio:g} times the alpha: the "
                f"optimal learning rate of A is {_moved(1.0, ratio)} than that of LoRA"
            )
        elif variant == "qlora":
            # Its best learning rate is that of LoRA.
            continue
        else:
            factor = lr_factor(variant, config.rank)
            advice = "LoRA's can be kept" if factor.value == 1 else "it depends on the weights, so try lower and higher"
            message = f"the best learning rate of {name} was {factor}; {advice}"
            source, sure = "measured, studies/variants/README.md", "measured on small models"
        place = {"lora_plus": "lr_ratio", "pissa": "variant", "olora": "variant"}.get(variant, variant)
        findings.append(Finding("variant", "note", message, source, sure, line=config.line(place)))
    return findings


def check_short_run(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether LoRA runs so briefly that its learning rate is not ten times that of full fine-tuning."""
    steps = config.steps
    if steps is None and config.examples and config.epochs and config.batch_size:
        steps = max(1.0, config.examples * config.epochs // config.batch_size)
    if config.method != "lora" or config.task != "sft" or steps is None or not 1 < steps < SHORT:
        return []
    message = (
        f"in {steps:g} steps LoRA does best at about 15 times the learning rate of full fine-tuning, not at 10 times; "
        "in so few steps little is learned, and more epochs make a run longer"
    )
    sure = "preliminary in the paper; measured here: 13 [8.2, 17] at 0.13B and 4.6 [2.8, 6.4] at 0.8M parameters"
    line = config.line("steps", "epochs")
    return [Finding("short-run", "note", message, "the paper; claim B9 of docs/results.md", sure, line=line)]


def check_batch(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether the batch is so large that LoRA may fall behind full fine-tuning."""
    if config.method != "lora" or config.task != "sft" or (config.batch_size or 0) < LARGE_BATCH:
        return []
    message = (
        f"LoRA may fall behind full fine-tuning at {config.batch_size} examples a step: the paper sees a gap that "
        "grows with the batch size from 32, whatever the rank"
    )
    sure = "the paper gives no number; over 2 sources with batches up to 512 it grew by -0.002 nats [-0.075, 0.070]"
    line = config.line("global_batch", "micro_batch", "accumulation")
    return [Finding("batch", "note", message, "the paper, figure 3; docs/other-runs.md", sure, line=line)]


def check_precision(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether weights are trained that can't be, or in which updates are lost."""
    if config.method != "fullft":
        return []
    line = config.line("bits", "precision")
    if config.bits in (4, 8):
        message = f"weights quantized to {config.bits} bits can't be trained; full fine-tuning needs bf16 or fp32"
        source = "transformers, whose Trainer stops with an error"
        return [Finding("precision", "error", message, source, "certain", line=line)]
    if not config.rounded or config.lr is None or not 0 < config.lr < _TYPICAL_WEIGHT:
        return []
    kept = kept_in_bf16(config.lr)
    if kept >= _MOST:
        return []
    message = (
        f"weights are held in bf16, which keeps {kept:.0%} of steps of {config.lr:g} if weights are of size "
        f"{_TYPICAL_WEIGHT:g}; weights in fp32, or an optimizer with stochastic rounding, keep all"
    )
    source = "SmolLM2-135M with weights in bf16 and in fp32, studies/bf16; Zamirai et al. 2020, arXiv 2010.06192"
    sure = (
        "certain unless DeepSpeed or accelerate's FSDP holds them in fp32; on SmolLM2-135M the best learning rate was "
        "8 times as high in RL and 4 times in supervised fine-tuning"
    )
    level: Level = "warning" if kept < _FEW else "note"
    return [Finding("precision", level, message, source, sure, line=line)]


def check_same_lr(configs: Sequence[TrainingConfig], known: Knowledge) -> list[Finding]:
    """Return LoRA runs with the learning rate of a full fine-tuning of the same model and task."""
    full: dict[Hashable, TrainingConfig] = {}
    for config in configs:
        if config.method == "fullft" and config.lr and config.model and config.task in _COMPARED:
            full.setdefault((config.format, _model(config), config.task, config.lr), config)
    findings = []
    for config in configs:
        other = full.get((config.format, _model(config), config.task, config.lr))
        if config.method != "lora" or other is None:
            continue
        if any(lr_factor(variant, config.rank).value != 1 for variant in config.variants):
            # The best learning rate of such a variant may be near that of full fine-tuning.
            continue
        level: Level = "warning" if config.task == "sft" else "note"
        ratio, sure = f"{RATIO:g} times as high", f"95% interval {RATIO_LOW:g} to {RATIO_HIGH:g}"
        if config.task == "rl":
            ratio, sure = "several times as high", "in reinforcement learning 2.6 and 43 were measured"
        message = (
            f"LoRA has the learning rate {config.lr:g} of full fine-tuning of the same model in {other.where}; LoRA's "
            f"best one is {ratio}, so that one of them costs loss"
        )
        findings.append(_at(config, "same-lr", level, message, _RATIO, sure, "lr"))
    return findings


def check_alpha_lr(configs: Sequence[TrainingConfig], known: Knowledge) -> list[Finding]:
    """Return LoRA runs that are alike but for alpha, at the same learning rate."""
    findings = []
    for group in _alike(configs, "lr", "steps", "epochs", "bits", "targets", "dora", "lr_ratio", "variant"):
        first, *others = sorted(group, key=lambda config: effective_alpha(config) or 0)
        alpha = effective_alpha(first)
        for other in others:
            to = effective_alpha(other)
            if not alpha or not to or to < 2 * alpha:
                continue
            message = (
                f"alpha is {_alpha(other)} and in {first.where}, which is alike, {_alpha(first)}, with the same "
                f"learning rate {other.lr:g}; the optimal one here is {_moved(alpha, to)}"
            )
            sure = "the factor is between two theories; measured from alpha 8 to 128 on small models"
            level: Level = "warning" if to >= 4 * alpha else "note"
            findings.append(_at(other, "alpha-lr", level, message, _THEORY, sure, "alpha", "rank"))
    return findings


def check_lr_differs(configs: Sequence[TrainingConfig], known: Knowledge) -> list[Finding]:
    """Return runs that are alike and have learning rates a factor of ten or more apart."""
    findings = []
    for group in _alike(configs, "rank", "alpha", "rslora", "dora", "lr_ratio", "variant"):
        low, high = (pick(group, key=lambda config: config.lr or 0) for pick in (min, max))
        if low.lr and high.lr and high.lr / low.lr >= FAR:
            message = (
                f"the learning rate {high.lr:g} is {high.lr / low.lr:.3g} times that of {low.where} with the same "
                "model, rank, alpha and batch size; at most one of them is good"
            )
            findings.append(_at(high, "lr-differs", "warning", message, "the files alone", "certain", "lr"))
    return findings


def _alike(configs: Sequence[TrainingConfig], *fields: str) -> Iterator[list[TrainingConfig]]:
    """Yield the groups of LoRA runs of one format that share model, task, batch size, optimizer and further fields."""
    groups: dict[Hashable, list[TrainingConfig]] = defaultdict(list)
    for config in configs:
        if config.method == "lora" and config.lr and config.model and config.task in _COMPARED:
            common = (config.format, _model(config), config.task, config.batch_size, config.optimizer)
            groups[common, *(getattr(config, field) for field in fields)].append(config)
    yield from (group for group in groups.values() if len(group) > 1)


def _model(config: TrainingConfig) -> str | None:
    """Return a model's name without its owner and the folder that it is in."""
    if config.model is None:
        return None
    return re.split(r"[/\\]", config.model.rstrip("/\\"))[-1].lower()


def _alpha(config: TrainingConfig) -> str:
    return f"{config.alpha:g} at rank {config.rank}" + (" with rsLoRA" if config.rslora else "")


def _at(config: TrainingConfig, code: str, level: Level, message: str, source: str, sure: str, *fields: str) -> Finding:
    """Return a finding of several runs at the place of one of them."""
    return Finding(code, level, message, source, sure, config.path, config.name, config.line(*fields))
