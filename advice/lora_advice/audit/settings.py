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
from lora_advice.audit.config import TrainingConfig, say
from lora_advice.audit.readers.options import frameworks
from lora_advice.finding import Finding, Level
from lora_advice.theory import ALPHA
from lora_advice.variants import VARIANT_NAMES, lr_factor

ALPHAS = (2.0, 512.0)
"""The optimal learning rate is measured here from alpha 8 to 128; beyond a further factor of 4 nothing is known."""
SHORT = 100  # the paper gives another ratio of learning rates for runs of fewer steps
LARGE_BATCH = 256
ALPHA_EXPONENTS = (0.5, 0.75, 1.0)
"""The optimal LR goes as alpha to minus this: while A moves freely, the middle, and while A stands still."""
FAR = 10.0  # the factor between two learning rates of the same setting from which one of them must be wrong
_MOST, _FEW = 0.8, 0.2
"""The shares of steps kept in bf16 above which nothing is said, and below which runs at the best LR of fp32 lost more
than a margin: 0.03 nats with 19% kept in SFT, and in RL 50 points of accuracy with 2.5% (studies/bf16)."""
_IN_BF16 = {
    "rl": "on SmolLM2-135M in RL the best learning rate was 8 times as high, and at 1e-5 the accuracy 0.37, not 0.87",
    "sft": "on SmolLM2-135M in SFT the best learning rate was 4 times as high, and at 1e-4 the loss 0.03 nats higher",
}
_TRAINER = ("axolotl", "llamafactory", "trl", "swift")
"""The formats of frameworks that train with the Trainer of transformers."""
_TYPICAL_WEIGHT = 0.02  # the standard deviation of the weights of large language models, roughly


def _moved(alpha: float, to: float) -> str:
    """Return in words by what factor the optimal learning rate moves from one alpha to another."""
    low, middle, high = (max(alpha / to, to / alpha) ** exponent for exponent in ALPHA_EXPONENTS)
    return f"{middle:.2g} ({low:.2g} to {high:.2g}) times {'lower' if to > alpha else 'higher'}"


def check_settings(config: TrainingConfig) -> Iterator[Finding]:
    """Yield what is found of LoRA's scale and variants, of the length and batch of its runs, and of the precision."""
    if config.method == "fullft" and config.bits in (4, 8):
        yield say("quantized", config.line("bits"), bits=config.bits)
    elif config.method == "fullft" and config.rounded and config.adam and 0 < (config.lr or 0.0) < _TYPICAL_WEIGHT:
        kept = kept_in_bf16(config.lr or 0.0)
        level: Level = "warning" if kept < _FEW else "note"
        if kept < _MOST:
            fp32 = frameworks()[config.format].get("fp32", "weights in fp32")
            unless = " unless DeepSpeed or accelerate's FSDP holds them in fp32" if config.format in _TRAINER else ""
            measured = _IN_BF16.get(config.task or "", "; ".join(_IN_BF16.values()))
            values = {"kept": kept, "lr": config.lr, "size": _TYPICAL_WEIGHT, "fp32": fp32}
            values |= {"unless": unless, "measured": measured}
            yield say("rounded", config.line("rounded"), level=level, **values)
    if config.method != "lora":
        return
    alpha, line = config.alpha, config.line("alpha", "rank")
    if alpha == 0 or config.rank == 0:
        yield say("zero", line, what="alpha" if alpha == 0 else "rank")
    if alpha is not None and not 0 < alpha < math.inf:
        alpha = None
    elif alpha and config.rank != 0 and not config.rslora and not ALPHAS[0] <= alpha <= ALPHAS[1]:
        yield say("alpha", line, alpha=alpha, moved=_moved(ALPHA, alpha))
    for variant in config.variants if config.lr else ():
        if variant == "rslora" and alpha and config.rank and config.rank > 0:
            scale = alpha * math.sqrt(config.rank)
            values = {"rank": config.rank, "scale": formats.number(scale), "moved": _moved(alpha, scale)}
            yield say("rslora", config.line("rslora"), alpha=alpha, **values)
        elif variant == "lora_plus":
            ratio = config.lr_ratio or 1.0
            yield say("lora_plus", config.line("lr_ratio"), ratio=ratio, moved=_moved(1.0, ratio))
        elif variant in ("dora", "pissa", "olora"):  # the best learning rate of QLoRA is that of LoRA
            factor = lr_factor(variant, config.rank)
            advice = "LoRA's can be kept" if factor.value == 1 else "it depends on the weights, so try lower and higher"
            line = config.line(variant if variant == "dora" else "variant")
            yield say("variant", line, name=VARIANT_NAMES[variant], factor=factor, advice=advice)
    if config.task == "sft":
        if config.steps is not None and 1 < config.steps < SHORT:
            yield say("short", config.line("steps"), steps=config.steps)
        if (config.batch_size or 0) >= LARGE_BATCH:
            yield say("batch", config.line("global_batch", "micro_batch", "accumulation"), batch=config.batch_size)


def kept_in_bf16(lr: float) -> float:
    """Return the share that bf16, of 8 significant bits, keeps of steps of Adam, which are about as large as `lr`."""
    normal = NormalDist(0, _TYPICAL_WEIGHT)
    weights = np.array([normal.inv_cdf(0.5 + (place + 0.5) / 1000) for place in range(500)])
    spacing = 2.0 ** (np.floor(np.log2(weights)) - 7)
    return float(np.mean(np.round(lr / spacing) * spacing) / lr)


def compare_runs(configs: Sequence[TrainingConfig]) -> list[Finding]:
    """Return LoRA runs with the learning rate of full fine-tuning, and like runs with rates a factor of ten apart."""
    findings = list[Finding]()
    full, alike = dict[Hashable, TrainingConfig](), defaultdict[Hashable, list[TrainingConfig]](list)
    of_lora = list[tuple[TrainingConfig, Hashable]]()
    for config in configs:
        # Preference training is several tasks, such as DPO and reward models, with learning rates of their own.
        if config.lr and config.model and config.task in ("sft", "rl"):
            # A model's name without its owner and the folder that it is in.
            model = re.split(r"[/\\]", config.model.rstrip("/\\"))[-1].lower()
            key = (config.format, model, config.task)
            if config.method == "fullft":
                full.setdefault((*key, config.lr), config)
            elif config.method == "lora":
                of_lora.append((config, (*key, config.lr)))
                settings = (config.batch_size, config.optimizer, config.rank, config.alpha, config.rslora, config.dora)
                alike[*key, *settings, config.lr_ratio, config.variant].append(config)
    for config, same in of_lora:
        other = full.get(same)
        # The best learning rate of some variants may be near that of full fine-tuning.
        moved = any(lr_factor(variant, config.rank).value != 1 for variant in config.variants)
        if other is not None and not moved:
            values = {"level": "warning", "ratio": "14 times as high", "sure": "95% interval 4.6 to 45"}
            if config.task == "rl":
                sure = "in reinforcement learning 3.5 and 56 were measured"
                values = {"level": "note", "ratio": "several times as high", "sure": sure}
            finding = say("same-lr", config.line("lr"), lr=config.lr, where=other.where, **values)
            findings.append(replace(finding, path=config.path, run=config.name))
    for group in alike.values():
        low, high = (pick(group, key=lambda config: config.lr or 0) for pick in (min, max))
        if low.lr and high.lr and high.lr / low.lr >= FAR:
            finding = say("lr-differs", high.line("lr"), lr=high.lr, ratio=high.lr / low.lr, where=low.where)
            findings.append(replace(finding, path=high.path, run=high.name))
    return findings
