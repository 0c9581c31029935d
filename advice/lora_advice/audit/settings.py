"""Findings about alpha and its variants, length, batch size and precision, and about runs that differ in one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np

from lora_advice import formats
from lora_advice.audit.config import Knowledge, TrainingConfig
from lora_advice.audit.texts import say
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
        return [say("zero", line, what="alpha" if config.alpha == 0 else "rank")]
    alpha = effective_alpha(config)
    if not alpha or config.rslora or ALPHAS[0] <= alpha <= ALPHAS[1]:
        return []
    return [say("alpha", line, alpha=alpha, moved=_moved(ALPHA, alpha))]


def check_variants(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what is known of the best learning rate of each variant of LoRA that a run with a learning rate uses."""
    findings = []
    for variant in config.variants if config.lr else ():
        alpha, scale = config.alpha, effective_alpha(config)
        if variant == "rslora":
            if alpha and scale:
                values = {"rank": config.rank, "scale": formats.number(scale), "moved": _moved(alpha, scale)}
                findings.append(say("rslora", config.line("rslora"), alpha=alpha, **values))
        elif variant == "lora_plus":
            ratio = config.lr_ratio or 1.0
            findings.append(say("lora_plus", config.line("lr_ratio"), ratio=ratio, moved=_moved(1.0, ratio)))
        elif variant != "qlora":  # its best learning rate is that of LoRA
            factor = lr_factor(variant, config.rank)
            advice = "LoRA's can be kept" if factor.value == 1 else "it depends on the weights, so try lower and higher"
            line = config.line(variant if variant == "dora" else "variant")
            findings.append(say("variant", line, name=VARIANT_NAMES[variant], factor=factor, advice=advice))
    return findings


def check_short_run(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether LoRA runs so briefly that its learning rate is not ten times that of full fine-tuning."""
    steps = config.steps
    if steps is None and config.examples and config.epochs and config.batch_size:
        steps = max(1.0, config.examples * config.epochs // config.batch_size)
    if config.method != "lora" or config.task != "sft" or steps is None or not 1 < steps < SHORT:
        return []
    return [say("short", config.line("steps", "epochs"), steps=steps)]


def check_batch(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether the batch is so large that LoRA may fall behind full fine-tuning."""
    if config.method != "lora" or config.task != "sft" or (config.batch_size or 0) < LARGE_BATCH:
        return []
    return [say("batch", config.line("global_batch", "micro_batch", "accumulation"), batch=config.batch_size)]


def check_precision(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether weights are trained that can't be, or in which updates are lost."""
    if config.method != "fullft":
        return []
    line = config.line("bits", "precision")
    if config.bits in (4, 8):
        return [say("quantized", line, bits=config.bits)]
    if not config.rounded or config.lr is None or not 0 < config.lr < _TYPICAL_WEIGHT:
        return []
    kept = kept_in_bf16(config.lr)
    level: Level = "warning" if kept < _FEW else "note"
    finding = say("rounded", line, level=level, kept=kept, lr=config.lr, size=_TYPICAL_WEIGHT)
    return [finding] if kept < _MOST else []


CHECKS = (check_scale, check_variants, check_short_run, check_batch, check_precision)


def check_same_lr(configs: Sequence[TrainingConfig]) -> list[Finding]:
    """Return LoRA runs with the learning rate of a full fine-tuning of the same model and task."""
    full: dict[Hashable, TrainingConfig] = {}
    for config in configs:
        if config.method == "fullft" and config.lr and config.model and config.task in _COMPARED:
            full.setdefault((config.format, _model(config), config.task, config.lr), config)
    findings = []
    for config in configs:
        other = full.get((config.format, _model(config), config.task, config.lr))
        # The best learning rate of some variants may be near that of full fine-tuning.
        moved = any(lr_factor(variant, config.rank).value != 1 for variant in config.variants)
        if config.method == "lora" and other is not None and not moved:
            values = {"level": "warning", "ratio": "14 times as high", "sure": "95% interval 3.2 to 61"}
            if config.task == "rl":
                sure = "in reinforcement learning 2.6 and 43 were measured"
                values = {"level": "note", "ratio": "several times as high", "sure": sure}
            finding = say("same-lr", config.line("lr"), lr=config.lr, where=other.where, **values)
            findings.append(replace(finding, path=config.path, run=config.name))
    return findings


def check_alpha_lr(configs: Sequence[TrainingConfig]) -> list[Finding]:
    """Return LoRA runs that are alike but for alpha, at the same learning rate."""
    findings = []
    for group in _alike(configs, "lr", "steps", "epochs", "bits", "targets", "dora", "lr_ratio", "variant"):
        first, *others = sorted(group, key=lambda config: effective_alpha(config) or 0)
        alpha = effective_alpha(first)
        for other in others:
            to = effective_alpha(other)
            if alpha and to and to >= 2 * alpha:
                level: Level = "warning" if to >= 4 * alpha else "note"
                values = {"where": first.where, "first": _alpha(first), "lr": other.lr, "moved": _moved(alpha, to)}
                finding = say("alpha-lr", other.line("alpha", "rank"), level=level, alpha=_alpha(other), **values)
                findings.append(replace(finding, path=other.path, run=other.name))
    return findings


def check_lr_differs(configs: Sequence[TrainingConfig]) -> list[Finding]:
    """Return runs that are alike and have learning rates a factor of ten or more apart."""
    findings = []
    for group in _alike(configs, "rank", "alpha", "rslora", "dora", "lr_ratio", "variant"):
        low, high = (pick(group, key=lambda config: config.lr or 0) for pick in (min, max))
        if low.lr and high.lr and high.lr / low.lr >= FAR:
            finding = say("lr-differs", high.line("lr"), lr=high.lr, ratio=high.lr / low.lr, where=low.where)
            findings.append(replace(finding, path=high.path, run=high.name))
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
