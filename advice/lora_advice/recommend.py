"""Settings to start from for a model and its data, each with its source, as a table.

The learning rates are pooled from all optima that are known: of published sources, of the paper's law as one of them,
and of your own finished presets (`learning_rates`). What was measured on a model of the same family and size is shown.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorabench.analysis import lr_ratio
from lorabench.analysis.arms import ALPHA
from lorabench.analysis.lr_law import PUBLISHED, lineage
from lorabench.claims.learning_rate import SHORT_RATIO
from lorabench.config.fields import VARIANT_NAMES, Placement, Variant
from lorabench.config.loading import parse_preset
from lorabench.config.margins import DEFAULT_MARGINS, DEFAULT_PREDICTIONS
from lorabench.custom.data import UserData
from lorabench.custom.learning_rates import (
    PROBABILITY,
    LrSources,
    SeenOptimum,
    SourceShare,
    known_optima,
    outside,
    published_optima,
    recommended_lr,
)
from lorabench.custom.model import UserModel
from lorabench.custom.preset import (
    GROUP_SIZE,
    PROBLEMS_PER_STEP,
    RL_STEPS,
    SHORT_STEPS,
    checked_gpu,
    recommended_batch,
    recommended_rank,
)
from lorabench.custom.variants import alpha_factor, lr_rule, measured_factor
from lorabench.errors import UserError
from lorabench.planning.costs import job_cost
from lorabench.planning.memory import TooLargeError
from lorabench.planning.plan import Plan, make_plan
from lorabench.runs import Job
from lorabench.sources.lr_optima import LrOptimum
from lorabench.utils import formats
from lorabench.utils.formats import print_table
from lorabench.utils.gpus import GB

PAPER = "the paper"
TITLES = {"lora": "LoRA", "fullft": "FullFT"}
DOCS = "the authors' rule: a LoRA parameter for each scored token, and 32 by default"
SMALLEST_WIDTH = 1000
"""About the hidden size of the smallest model, Qwen3-0.6B with 1024, that the authors' law was shown for."""

# The data to estimate costs for if the user names none: scored tokens, tokens of an example, characters of the longest.
_ASSUMED_TOKENS, _ASSUMED_EXAMPLE_TOKENS, _ASSUMED_MAX_CHARS = 1_000_000, 500, 6000
# Tokens that go through the model at once: few, so that activations do not decide the number of GPUs.
_MICRO_BATCH_TOKENS = 2048
MOST_GPUS = 1024
"""The most GPUs that costs are estimated for."""


@dataclass(frozen=True)
class Setting:
    """A recommended setting: its name for a reader, its value, and where the value comes from."""

    what: str
    value: float | int | str
    source: str
    low: float | None = None
    """The ends of its interval, of a learning rate."""
    high: float | None = None


@dataclass(frozen=True)
class KnownLr:
    """A learning rate that is known to be good elsewhere; what is null there is as here."""

    lr: float | None = None
    """Null for the recommended one of LoRA."""
    alpha: float | None = None
    rank: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    to_alpha: float = ALPHA
    """Alpha here."""
    to_rank: int | None = None
    """The rank here; null for that of the known learning rate, or else the recommended one."""
    variant: Variant = "lora"
    to_variant: Variant = "lora"


@dataclass(frozen=True)
class Recommendation:
    """The recommended settings for a model and its data; as a dict it is what `--json` prints."""

    model: dict[str, str | int]
    """The model's name, family, number of parameters and hidden size."""
    settings: dict[str, Setting]
    sources_of_lr: dict[str, LrSources]
    """By method, the sources that its learning rate rests on."""
    seen: tuple[SeenOptimum, ...]
    notes: tuple[str, ...]


def recommend(
    model: UserModel,
    completion_tokens: float | None,
    data: UserData | None,
    gpu: str,
    results: Path = Path("results"),
    batch_size: int | None = None,
    steps: int | None = None,
    known: KnownLr | None = None,
) -> Recommendation:
    """Recommend settings for a model.

    Args:
        model: the model.
        completion_tokens: the number of scored tokens of the training data; None if unknown.
        data: the examined data; None if only their size, or nothing, is known.
        gpu: the GPU to estimate costs for, a name of lorabench/utils/gpus.py.
        results: the folder of finished presets.
        batch_size: the number of examples per step; None for the recommended one.
        steps: the number of steps; None for an epoch of the data, or if there are no data, for a length not known.
        known: a learning rate to convert to these settings, also of another variant of LoRA.

    Raises:
        UserError: the GPU is not known, the batch size is larger than the data, or a learning rate is to be converted
            and the number of steps is not known.
    """
    examples = data.usable if data else math.ceil((completion_tokens or _ASSUMED_TOKENS) / _ASSUMED_EXAMPLE_TOKENS)
    batch = batch_size or recommended_batch(examples)
    if data and batch > examples:
        raise UserError(f"batch size {batch} is more than the {examples} training examples")
    examples = max(examples, batch)
    length = float(steps or (max(1, examples // batch) if data or completion_tokens else math.nan))
    chosen_rank = (known.to_rank or known.rank) if known else None
    hidden, rank = model.sizes.hidden, chosen_rank or recommended_rank(model, completion_tokens)
    alpha = known.to_alpha if known else ALPHA
    seen, optima, same = known_optima(model, results)
    settings, sources_of_lr, rl_settings = {}, {}, {}
    rl_batch, rl_length = GROUP_SIZE * PROBLEMS_PER_STEP, steps or min(RL_STEPS)
    for method, title in TITLES.items():
        (lr, low, high), sources = recommended_lr(optima, model.family, hidden, method, batch, length, same=same)
        why = f"pooled over {len(sources.sources)} sources; {PROBABILITY:.0%} interval"
        why += f"; {sources.measured_by} measured this model" if sources.measured_by else ""
        settings[f"{method}_lr"] = Setting(f"{title} learning rate", lr, why, low, high)
        sources_of_lr[method] = sources
        (lr, low, high), sources = recommended_lr(
            optima, model.family, hidden, method, rl_batch, rl_length, rl=True, same=same
        )
        why = f"pooled over {len(sources.sources)} sources; {PROBABILITY:.0%} interval; they differ much, so sweep it"
        rl_settings[f"rl_{method}_lr"] = Setting(f"{title} learning rate in RL", lr, why, low, high)
    settings |= rl_settings
    if known:
        log_error = 0.0
        if known.lr is None:
            if math.isnan(length):
                raise UserError("the learning rate of a variant can't be given without a number of steps: give --steps")
            pooled = settings["lora_lr"]
            log_error = math.log(pooled.high / pooled.low) / 2 if pooled.low and pooled.high else 0.0
            known = replace(known, lr=float(pooled.value), alpha=ALPHA, rank=rank)
        settings["converted_lr"] = _converted(known, optima, same, model, rank, batch, length, log_error)
    settings["rank"] = Setting("LoRA rank", rank, "your choice" if chosen_rank else DOCS)
    settings["lora_parameters"] = Setting("LoRA parameters", model.lora_parameters(rank), "counted")
    why = f"{PAPER}: attention alone is worse"
    settings["placement"] = Setting("layers with LoRA", "all, and the unembedding", why)
    settings["alpha"] = Setting("alpha, at every rank", alpha, PAPER if alpha == ALPHA else "your choice")
    settings["schedule"] = Setting("learning rate over time", "constant, no warm-up", PAPER)
    why = "your choice" if batch_size else f"{PAPER}: both methods do best at small batches, LoRA above all"
    settings["batch_size"] = Setting("batch size", batch, why)
    costs, too_large = _costs(model, data, completion_tokens, examples, batch, checked_gpu(gpu))
    notes = [
        *outside(optima, model.family, hidden, batch, length),
        f"The learning rates in reinforcement learning (RL) are for {rl_length} steps of {rl_batch} responses.",
        *too_large,
        *_notes(model, rank, length, completion_tokens),
        "`lorabench init` writes a preset that measures these settings on your own data.",
    ]
    about: dict[str, str | int] = {"name": model.name, "family": model.family, "parameters": model.parameters}
    about["hidden_size"] = hidden
    shown = (*seen, *published_optima(model, rank))
    return Recommendation(about, settings | costs, sources_of_lr, shown, tuple(notes))


def _converted(
    known: KnownLr,
    optima: Sequence[LrOptimum],
    same: Collection[tuple[str, str]],
    model: UserModel,
    rank: int,
    batch: int,
    steps: float,
    log_error: float = 0.0,
) -> Setting:
    """Convert a known LR to other settings and another variant.

    The theory `movement` converts it to another alpha and rank, and to other steps and batch sizes with FullFT's pooled
    LRs. In it rsLoRA and LoRA+ are LoRA with another alpha. LRs of other variants are LoRA's times what was measured.
    `rank` is the rank to convert to, and `log_error` half the interval of the logarithm of the known LR.
    """
    assert known.lr
    if math.isnan(steps):
        raise UserError(f"the learning rate {known.lr:g} can't be converted without a number of steps: give --steps")
    hidden = model.sizes.hidden
    from_alpha, from_rank = known.alpha or known.to_alpha, known.rank or rank
    here = lr_ratio.Setting(hidden, known.steps or steps, known.batch_size or batch, from_alpha, rank=from_rank)
    there = lr_ratio.Setting(hidden, steps, batch, known.to_alpha, rank=rank)
    before, after = (
        recommended_lr(optima, model.family, hidden, "fullft", place.batch_size, place.steps, same=same)[0][0]
        for place in (here, there)
    )
    movement = DEFAULT_PREDICTIONS.lr_ratio.movement
    assert movement
    variants = ((known.variant, here), (known.to_variant, there))
    as_lora = [replace(place, alpha=place.alpha * alpha_factor(variant, place.rank)) for variant, place in variants]
    factor, to_factor = (measured_factor(variant, place.rank) for variant, place in variants)
    lora_lr = lr_ratio.converted_lr(known.lr / factor.value, as_lora[0], as_lora[1], movement, after / before)
    lr = lora_lr * to_factor.value
    # Between settings of one variant its factor cancels.
    factors = [0.0] if known.variant == known.to_variant else [factor.log_error, to_factor.log_error]
    error = math.hypot(log_error, *factors)
    ends = [float(f"{lr * math.exp(sign * error):.2g}") if error else None for sign in (-1, 1)]
    stated = [
        f"{VARIANT_NAMES[variant]} at alpha {place.alpha:g}, rank {place.rank:g}, {place.steps:g} steps of "
        f"{place.batch_size:g} examples"
        for variant, place in variants
    ]
    why = f"by the theory `movement` (docs/lr-ratio.md) from {known.lr:g} of {stated[0]} to {stated[1]}"
    rules = [lr_rule(variant) for variant in dict.fromkeys((known.variant, known.to_variant)) if variant != "lora"]
    name = VARIANT_NAMES[known.to_variant]
    return Setting(f"{name} learning rate, converted", float(f"{lr:.2g}"), "; ".join([why, *rules]), *ends)


def cost_plan(
    model: UserModel,
    gpu: str,
    rank: int,
    placement: Placement,
    examples: int,
    batch: int,
    mean_tokens: float = _ASSUMED_EXAMPLE_TOKENS,
    max_chars: int = _ASSUMED_MAX_CHARS,
) -> Plan:
    """Return the plan of one run of each method for an epoch on a GPU, from which costs can be estimated.

    Activations are recomputed where a method then needs fewer GPUs.

    Args:
        examples: the number of training examples.
        batch: the number of examples per step.
        mean_tokens: tokens of an example, on average.
        max_chars: characters of the longest example.
    """
    # The estimate reads no data, so a dataset of the hub can stand for any other.
    dataset = {"kind": "hub", "id": "own/data", "train": examples, "validation": 1, "test": 1}
    dataset |= {"max_chars": max(32, max_chars), "mean_tokens": max(1, round(mean_tokens))}
    block = {"models": ["m"], "datasets": ["d"], "ranks": {placement: [rank]}, "batch_sizes": [batch], "seeds": 1}
    execution = {"gpu": gpu, "max_gpus": MOST_GPUS, "max_batch_tokens": _MICRO_BATCH_TOKENS}
    raw = {
        "description": "costs of a recommendation",
        "models": {"m": model.spec.model_dump()},
        "datasets": {"d": dataset},
        "protocol": {"precision": "bf16"},
        "experiments": {"rank": [block | {"lrs": {"fullft": [1e-4], "lora": [1e-3]}}]},
        "margins": DEFAULT_MARGINS.model_dump(),
        "execution": execution | {"activation_checkpointing": "auto"},
    }
    return make_plan(parse_preset(raw, Path("recommendation")))


def _costs(
    model: UserModel, data: UserData | None, completion_tokens: float | None, examples: int, batch: int, gpu: str
) -> tuple[dict[str, Setting], list[str]]:
    """Estimate the cost of one run of each method for an epoch, as a preset with these two runs would cost.

    Returns:
        Memory and GPU-hours as settings, and a sentence for each method that fits on no number of GPUs.
    """
    mean = data.mean_tokens if data else (completion_tokens or _ASSUMED_TOKENS) / examples
    longest = data.max_chars if data else _ASSUMED_MAX_CHARS
    plan = cost_plan(model, gpu, recommended_rank(model, completion_tokens), "all", examples, batch, mean, longest)
    amount = "an epoch" if data or completion_tokens else "a million tokens"
    settings, too_large = {}, []
    for method, title in TITLES.items():
        size = f"{title}, GB on each GPU"
        try:
            cost = job_cost(plan, Job(tuple(sweep for sweep in plan.sweeps if sweep.condition.method == method)))
        except TooLargeError as large:
            source = f"estimated for up to {MOST_GPUS:,} x {gpu}"
            settings[f"{method}_gigabytes"] = Setting(size, "does not fit", source)
            more = "only still more GPUs would do"
            if large.undivided > large.available:
                more = (
                    f"more GPUs don't help, since {large.undivided / GB:.0f} GB are not divided among them: "
                    "activations, logits and whole layers"
                )
            too_large.append(
                f"{title} does not fit on {gpu}, which has {large.available / GB:.0f} GB to give: each of "
                f"{MOST_GPUS:,} GPUs would need {large.needed / GB:.0f} GB; {more}. "
                "The other settings hold all the same."
            )
        else:
            source, hours = f"estimated for {cost.gpus} x {gpu}", float(f"{cost.gpu_hours:.2g}")
            settings[f"{method}_gigabytes"] = Setting(size, round(cost.memory / GB, 2), source)
            settings[f"{method}_gpu_hours"] = Setting(f"{title}, GPU-hours of {amount}", hours, source)
    return settings, too_large


def _notes(model: UserModel, rank: int, steps: float, completion_tokens: float | None) -> list[str]:
    """Return sentences about short runs, narrow models, and the capacity of LoRA for the data."""
    notes, hidden = [], model.sizes.hidden
    if steps < SHORT_STEPS:
        notes.append(
            f"The run has {steps:.0f} steps. Below {SHORT_STEPS} the paper gives an optimal LR of LoRA of "
            f"about {SHORT_RATIO:g} times that of FullFT, in place of 10."
        )
    if hidden < SMALLEST_WIDTH and lineage(model.family) in PUBLISHED.exponents:
        notes.append(f"Width {hidden} is below the widths that the law was shown for: its form is an extrapolation.")
    if completion_tokens is not None:
        parameters = model.lora_parameters(rank)
        if parameters < completion_tokens:
            notes.append(
                f"Rank {rank} has {parameters:,} parameters for {completion_tokens:,.0f} scored tokens, and a higher "
                "rank is not recommended here: LoRA may run out of capacity; compare with full fine-tuning."
            )
        # One bit per token and two bits per parameter are the numbers in the paper's discussion of capacity.
        notes.append(
            f"About {formats.amount(completion_tokens, 'bit')} in the data at one bit per token (the cost of "
            f"memorizing them; generalizing takes less), {formats.amount(2 * parameters, 'bit')} in the adapter at "
            "two bits per parameter."
        )
    return notes


def recommendation_table(recommendation: Recommendation) -> None:
    """Print the settings with their sources, the optimal LRs of published and of your own runs, and the notes."""
    rows: list[Sequence[str]] = []
    for name, setting in recommendation.settings.items():
        value = setting.value if isinstance(setting.value, str) else f"{setting.value:,}"
        if name.endswith("_lr"):
            value = formats.lr(setting.value)
            value += "" if setting.low is None else f" ({_interval(setting.low, setting.high, 2)})"
        rows.append((setting.what, value, setting.source))
    print_table(("setting", "value", "source"), rows)

    by_source: dict[str, dict[str, SourceShare]] = {}
    for method, lr_sources in recommendation.sources_of_lr.items():
        for share in lr_sources.sources:
            by_source.setdefault(share.source, {})[method] = share
    rows = []
    for source, shares in sorted(by_source.items(), key=lambda item: -sum(share.weight for share in item[1].values())):
        row = [source, next(iter(shares.values())).widths]
        for method in TITLES:
            if method in shares:
                low, high, weight = shares[method].low, shares[method].high, shares[method].weight
                row += [formats.lr(low, 2) if low == high else _interval(low, high, 2), f"{round(weight, 2) + 0.0:.0%}"]
            else:
                row += [formats.DASH, formats.DASH]
        rows.append(row)
    laws = {method: formats.lr(lr_sources.law) for method, lr_sources in recommendation.sources_of_lr.items()}
    rows.append(["the law alone", "", laws["lora"], "", laws["fullft"], ""])
    print_table(("LRs rest on", "widths", "LoRA", "weight", "FullFT", "weight"), rows)

    if recommendation.seen:
        rows = []
        for seen in recommendation.seen:
            arm = "FullFT" if seen.method == "fullft" else f"LoRA r{seen.rank}"
            interval = "" if seen.low is None or seen.high is None else _interval(seen.low, seen.high)
            rows.append((arm, formats.lr(seen.lr), interval, seen.where))
        print_table(("optimal LR of", "LR", "95% interval", "source"), rows)
    for note in recommendation.notes:
        print(f"- {note}")


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return f"{formats.lr(low, digits)} to {formats.lr(high, digits)}"
