"""Settings to start from for a model and its data, each with its source, and the conversion of a known learning rate.

The learning rates (LRs) are pooled from all optima that are known (`optima`). The other settings are those of the paper
and of its authors' code, which is tinker-cookbook, their library's public repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advice import formats
from lora_advice.errors import UserError
from lora_advice.models import ModelFacts, find_model, lora_parameters, model_of_config
from lora_advice.optima import PROBABILITY, KnownOptima, LrSources, SourceShare
from lora_advice.theory import ALPHA, SHORT_RATIO, LoraSetting, converted_lr
from lora_advice.variants import LORA_PLUS_RATIO, VARIANT_NAMES, Variant, lr_rule, measured_factor

TITLES = {"lora": "LoRA", "fullft": "FullFT"}
DEFAULT_RANK, MAX_RANK = 32, 512  # the default rank of the authors' library, and the paper's largest
SHORT_STEPS = 100  # steps below which the paper calls a run short
GROUP_SIZE = PROBLEMS_PER_STEP = 16
RL_STEPS = 50  # the number of steps in reinforcement learning where none is given

_LARGEST_BATCH, _SMALLEST_BATCH = 32, 4
# The data if the user names none: scored tokens, and tokens of an example.
_TOKENS, _EXAMPLE_TOKENS = 1_000_000, 500


@dataclass(frozen=True)
class Setting:
    """A recommended setting: its name for a reader, its value, and where the value comes from."""

    what: str
    value: float | int | str
    source: str
    low: float | None = None  # the ends of its interval, of a learning rate
    high: float | None = None

    @property
    def interval(self) -> str:
        """Its interval in words, of a learning rate that has one."""
        ends = [formats.lr(end, 2) for end in (self.low, self.high) if end is not None]
        return " to ".join(ends)


@dataclass(frozen=True)
class Recommendation:
    """The recommended settings for a model and its data; as a dict it is what `--json` prints."""

    model: dict[str, str | int | None]  # the model's name, family, number of parameters and hidden size
    settings: dict[str, Setting]
    sources_of_lr: dict[str, LrSources]  # by method, the sources that its learning rate rests on
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LoraRun:
    """LoRA, or a variant of it, in a setting; fields left as None take the values of the other setting."""

    variant: Variant = "lora"
    alpha: float | None = None
    rank: int | None = None
    steps: float | None = None
    batch_size: int | None = None


def recommended_batch(examples: int) -> int:
    """Return a batch size: 32, halved down to 4 until an epoch has 100 steps.

    In the paper both methods reach their lowest loss at small batches, and LoRA loses more at large ones.
    """
    size = _LARGEST_BATCH
    while size > _SMALLEST_BATCH and examples // size < SHORT_STEPS:
        size //= 2
    return min(size, examples)


def recommended_rank(model: ModelFacts, tokens: float | None) -> int:
    """Return the authors' default rank, or a higher one if the data need it.

    By the documentation of the authors' library, LoRA needs a parameter for each scored token; the smallest power of
    two that has them is taken. The highest rank is the paper's, or that at which LoRA's matrices outgrow the weights.
    """
    share = max(1.0, (tokens or 1.0) / lora_parameters(model, 1))
    return min(max(DEFAULT_RANK, 1 << math.ceil(math.log2(share))), MAX_RANK, model.width // 2)


def recommend(
    model: ModelFacts | str | Mapping[str, Any],
    tokens: float | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    steps: int | None = None,
    results: Path = Path("results"),
) -> Recommendation:
    """Recommend settings for a model as from `find_model`, the name that it takes, or the content of a `config.json`.

    The data have so many scored tokens and examples, if they are known. None stands for the recommended batch size, in
    examples per step, and for the steps of an epoch. Your own finished presets in the folder `results` count too.
    """
    if not isinstance(model, ModelFacts):
        model = find_model(model) if isinstance(model, str) else model_of_config(model)
    if batch_size and examples and batch_size > examples:
        raise UserError(f"batch size {batch_size} is more than the {examples} training examples")
    count = examples or math.ceil((tokens or _TOKENS) / _EXAMPLE_TOKENS)
    batch = batch_size or recommended_batch(count)
    length = float(steps or (max(1, count // batch) if examples or tokens else math.nan))
    rank, known = recommended_rank(model, tokens), KnownOptima(model, results)
    settings, rl_settings, sources_of_lr = dict[str, Setting](), dict[str, Setting](), {}
    rl_batch, rl_length = GROUP_SIZE * PROBLEMS_PER_STEP, steps or RL_STEPS
    for method, title in TITLES.items():
        (lr, *ends), sources = known.recommend(method, batch, length)
        why = f"pooled over {len(sources.sources)} sources; {PROBABILITY:.0%} interval"
        why += f"; {sources.measured_by} measured this model" if sources.measured_by else ""
        settings[f"{method}_lr"] = Setting(f"{title} learning rate", lr, why, *ends)
        sources_of_lr[method] = sources
        (lr, *ends), sources = known.recommend(method, rl_batch, rl_length, rl=True)
        why = f"pooled over {len(sources.sources)} sources; {PROBABILITY:.0%} interval; they differ much, so sweep it"
        rl_settings[f"rl_{method}_lr"] = Setting(f"{title} learning rate in RL", lr, why, *ends)
    parameters = lora_parameters(model, rank)
    settings |= rl_settings | {
        "rank": Setting(
            "LoRA rank", rank, "the authors' rule: a LoRA parameter for each scored token, and 32 by default"
        ),
        "lora_parameters": Setting("LoRA parameters", parameters, "counted"),
        "placement": Setting("layers with LoRA", "all, and the unembedding", "the paper: attention alone is worse"),
        "alpha": Setting("alpha, at every rank", ALPHA, "the paper"),
        "schedule": Setting("learning rate over time", "constant, no warm-up", "the paper"),
        "batch_size": Setting(
            "batch size",
            batch,
            "your choice" if batch_size else "the paper: both methods do best at small batches, LoRA above all",
        ),
    }
    notes = known.outside(batch, length)
    notes.append(
        f"The learning rates in reinforcement learning (RL) are for {rl_length} steps of {rl_batch} responses."
    )
    if length < SHORT_STEPS:
        notes.append(
            f"The run has {length:.0f} steps. Below {SHORT_STEPS} the paper gives an optimal LR of LoRA of "
            f"about {SHORT_RATIO:g} times that of FullFT, in place of 10."
        )
    if tokens is not None and parameters < tokens:
        notes.append(
            f"Rank {rank} has {parameters:,} parameters for {tokens:,.0f} scored tokens, and a higher rank is not "
            "recommended here: LoRA may run out of capacity; compare with full fine-tuning."
        )
    notes.append(
        "`lorabench init` writes a preset that measures these settings on your own data, and `lorabench plan` says "
        "what it costs."
    )
    about = {"name": model.name, "family": model.family, "parameters": model.parameters, "hidden_size": model.width}
    return Recommendation(about, settings, sources_of_lr, tuple(notes))


def convert(
    model: ModelFacts, lr: float | None, here: LoraRun, there: LoraRun, results: Path = Path("results")
) -> Setting:
    """Convert an optimal LR of LoRA to other settings and another variant; without a number of steps it is a UserError.

    The theory `movement` converts it to another alpha and rank, and to other steps and batch sizes with FullFT's pooled
    LRs. In it rsLoRA and LoRA+ are LoRA with another alpha. LRs of other variants are LoRA's times what was measured.
    An LR of None is the recommended one of LoRA at alpha 32; `results` is that of `recommend`.
    """
    if not there.steps:
        raise UserError("a learning rate can't be converted without a number of steps: give --steps")
    batch = there.batch_size or recommended_batch(_TOKENS // _EXAMPLE_TOKENS)
    rank = there.rank or here.rank or recommended_rank(model, None)
    wanted: tuple[float, ...] = (there.alpha or ALPHA, rank, there.steps, batch)
    known, log_error = KnownOptima(model, results), 0.0
    if lr is None:
        (lr, low, high), _ = known.recommend("lora", batch, there.steps)
        here, log_error = LoraRun(alpha=ALPHA), math.log(high / low) / 2
    stated = (here.alpha, here.rank, here.steps, here.batch_size)
    given = tuple(own or other for own, other in zip(stated, wanted, strict=True))
    fullft, as_lora, factors, runs = [], [], [], []
    for variant, (alpha, own_rank, steps, size) in ((here.variant, given), (there.variant, wanted)):
        fullft.append(known.recommend("fullft", size, steps)[0][0])
        alpha_factor = {"rslora": math.sqrt(own_rank), "lora_plus": LORA_PLUS_RATIO}.get(variant, 1.0)
        as_lora.append(LoraSetting(model.width, steps, alpha * alpha_factor, own_rank))
        factors.append(measured_factor(variant, own_rank))
        name = VARIANT_NAMES[variant]
        runs.append(f"{name} at alpha {alpha:g}, rank {own_rank:g}, {steps:g} steps of {size:g} examples")
    first, last = as_lora
    converted = converted_lr(lr / factors[0].value, first, last, fullft[1] / fullft[0]) * factors[1].value
    # Between settings of one variant its factor cancels.
    error = math.hypot(log_error, *(factor.log_error for factor in factors if here.variant != there.variant))
    ends = [float(f"{converted * math.exp(sign * error):.2g}") if error else None for sign in (-1, 1)]
    rules = [lr_rule(variant) for variant in dict.fromkeys((here.variant, there.variant)) if variant != "lora"]
    why = "; ".join([f"by the theory `movement` from {lr:g} of {runs[0]} to {runs[1]}", *rules])
    return Setting(f"{name} learning rate, converted", float(f"{converted:.2g}"), why, *ends)


def recommendation_table(recommendation: Recommendation) -> None:
    """Print the settings with their sources, and the notes."""
    rows: list[Sequence[str]] = [
        (
            each.what,
            lr_text(each) if each.interval else f"{each.value:{'' if isinstance(each.value, str) else ','}}",
            each.source,
        )
        for each in recommendation.settings.values()
    ]
    formats.print_table(("setting", "value", "source"), rows)
    by_source: dict[str, dict[str, SourceShare]] = {}
    for method, sources in recommendation.sources_of_lr.items():
        for share in sources.sources:
            by_source.setdefault(share.source, {})[method] = share
    rows = []
    for source, shares in sorted(by_source.items(), key=lambda item: -sum(share.weight for share in item[1].values())):
        weights = [f"{shares[method].weight:.0%}" if method in shares else "\N{EN DASH}" for method in TITLES]
        rows.append((source, [*shares.values()][-1].widths, *weights))
    formats.print_table(("LRs rest on", "widths", "weight for LoRA", "for FullFT"), rows)
    for note in recommendation.notes:
        print(f"- {note}")


def lr_text(lr: Setting) -> str:
    """Return a learning rate with its interval, if it has one."""
    return formats.lr(float(lr.value)) + (f" ({lr.interval})" if lr.interval else "")
