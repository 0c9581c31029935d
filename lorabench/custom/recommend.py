"""Settings to start from for a model and its data, each with its source, as a table and as a script that trains.

The learning rates are pooled from all optima that are known: of published sources, of the paper's law as one of them,
and of your own finished presets (`learning_rates`). What your presets measured on a model of the same family and size,
and what others published for it, is shown next to them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.config.inputs import GgufModel
from lorabench.config.loading import parse_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.custom.data import UserData
from lorabench.custom.learning_rates import (
    PROBABILITY,
    RecommendedLr,
    SeenOptimum,
    SourceShare,
    measured_optima,
    outside,
    published_optima,
    recommended_lr,
)
from lorabench.custom.model import UserModel
from lorabench.custom.preset import (
    ALPHA,
    GROUP_SIZE,
    PROBLEMS_PER_STEP,
    RL_STEPS,
    SHORT_RATIO,
    SHORT_STEPS,
    SMALLEST_WIDTH,
    checked_gpu,
    covered,
    recommended_batch,
    recommended_rank,
)
from lorabench.data.files import REPEATED, TOO_LONG
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.specs import template_text
from lorabench.planning.costs import Cost, job_cost
from lorabench.planning.memory import TooLargeError
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.sources.lr_optima import LrOptimum, optima_of_table
from lorabench.utils import formats
from lorabench.utils.files import LR_OPTIMA
from lorabench.utils.formats import print_table
from lorabench.utils.gpus import GB

PAPER = "the paper"
TITLES = {"lora": "LoRA", "fullft": "FullFT"}
DOCS = "the authors' rule: a LoRA parameter for each scored token, and 32 by default"
# The amount of data to estimate costs for if the user names none.
_ASSUMED_TOKENS = 1_000_000
_ASSUMED_EXAMPLE_TOKENS = 500
_ASSUMED_MAX_CHARS = 6000
# Tokens that go through the model at once: few, so that activations do not decide the number of GPUs.
_MICRO_BATCH_TOKENS = 2048
_MOST_GPUS = 1024


_TEMPLATE = Path(__file__).with_name("finetune.py")
_MAX_TOKENS = 4096


@dataclass(frozen=True)
class Setting:
    """One recommended setting."""

    name: str
    what: str
    """The setting's name for a reader."""
    value: float | int | str
    source: str
    """Where the value comes from."""
    low: float | None = None
    """The ends of its interval, of a learning rate."""
    high: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """The recommended settings for a model and its data, the optimal LRs seen so far, and notes."""

    model: UserModel
    rank: int
    batch_size: int
    settings: tuple[Setting, ...]
    lrs: tuple[RecommendedLr, ...]
    """The learning rates of LoRA and FullFT with the sources that they rest on."""
    seen: tuple[SeenOptimum, ...]
    notes: tuple[str, ...]

    def setting(self, name: str) -> Setting:
        """Return the setting of a name."""
        return next(setting for setting in self.settings if setting.name == name)

    def plain(self) -> dict[str, Any]:
        """Return the recommendation as plain data for JSON."""
        named = {name: getattr(self.model, name) for name in ("name", "family", "parameters")}
        settings = {setting.name: asdict(setting) for setting in self.settings}
        lrs = {lr.method: asdict(lr) for lr in self.lrs}
        return {
            "model": named | {"hidden_size": self.model.sizes.hidden},
            "settings": {
                name: {key: fields[key] for key in fields if key != "name"} for name, fields in settings.items()
            },
            "sources_of_lr": {
                method: {key: fields[key] for key in ("law", "measured_by", "sources")}
                for method, fields in lrs.items()
            },
            "seen": [asdict(seen) for seen in self.seen],
            "notes": list(self.notes),
        }


def recommend(
    model: UserModel,
    completion_tokens: float | None,
    data: UserData | None,
    gpu: str,
    results: Path = Path("results"),
    batch_size: int | None = None,
    steps: int | None = None,
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

    Raises:
        UserError: the GPU is not known, or the batch size is larger than the data.
    """
    examples = data.usable if data else math.ceil((completion_tokens or _ASSUMED_TOKENS) / _ASSUMED_EXAMPLE_TOKENS)
    batch = batch_size or recommended_batch(examples)
    if data and batch > examples:
        raise UserError(f"batch size {batch} is more than the {examples} training examples")
    examples = max(examples, batch)
    length = float(steps or (max(1, examples // batch) if data or completion_tokens else math.nan))
    hidden = model.sizes.hidden
    why = "your choice" if batch_size else f"{PAPER}: both methods do best at small batches, LoRA above all"
    rank = recommended_rank(hidden, model.lora_parameters(1), completion_tokens)
    seen, own = measured_optima(model, results)
    optima = [*optima_of_table(pd.read_csv(LR_OPTIMA)), *own]
    lrs = tuple(recommended_lr(optima, model.family, hidden, method, batch, length) for method in ("lora", "fullft"))
    settings = []
    for lr in lrs:
        source = f"pooled over {len(lr.sources)} sources; {PROBABILITY:.0%} interval"
        source += f"; {lr.measured_by} measured this model" if lr.measured_by else ""
        settings.append(
            Setting(f"{lr.method}_lr", f"{TITLES[lr.method]} learning rate", lr.lr, source, lr.low, lr.high)
        )
    settings += [
        Setting("rank", "LoRA rank", rank, DOCS),
        Setting("lora_parameters", "LoRA parameters", model.lora_parameters(rank), "counted"),
        Setting("placement", "layers with LoRA", "all, and the unembedding", f"{PAPER}: attention alone is worse"),
        Setting("alpha", "alpha, at every rank", ALPHA, PAPER),
        Setting("schedule", "learning rate over time", "constant, no warm-up", PAPER),
        Setting("batch_size", "batch size", batch, why),
    ]
    notes = [*outside(optima, model.family, hidden, batch, length), _rl_note(optima, model)]
    bills = _bills(model, data, completion_tokens, examples, batch, rank, checked_gpu(gpu))
    amount = "an epoch" if data or completion_tokens else "a million tokens"
    for method, title in TITLES.items():
        bill, size = bills[method], f"{title}, GB on each GPU"
        if isinstance(bill, TooLargeError):
            no_gpus = f"estimated for up to {_MOST_GPUS:,} x {gpu}"
            settings.append(Setting(f"{method}_gigabytes", size, "does not fit", no_gpus))
            notes.append(_too_large(title, gpu, bill))
        else:
            source, hours = f"estimated for {bill.gpus} x {gpu}", float(f"{bill.gpu_hours:.2g}")
            settings.append(Setting(f"{method}_gigabytes", size, round(bill.memory / GB, 2), source))
            settings.append(Setting(f"{method}_gpu_hours", f"{title}, GPU-hours of {amount}", hours, source))
    notes += _notes(model, rank, length, completion_tokens)
    shown = (*seen, *published_optima(model.name, rank))
    return Recommendation(model, rank, batch, tuple(settings), lrs, shown, tuple(notes))


def _rl_note(optima: Sequence[LrOptimum], model: UserModel) -> str:
    """Say what is known of RL, at the batch of the paper and a length within its rule."""
    responses, steps = GROUP_SIZE * PROBLEMS_PER_STEP, min(RL_STEPS)
    parts = []
    for method in ("lora", "fullft"):
        lr = recommended_lr(optima, model.family, model.sizes.hidden, method, responses, steps, rl=True)
        ends = f"{formats.lr(lr.low, 2)} to {formats.lr(lr.high, 2)}, {len(lr.sources)} sources"
        parts.append(f"{formats.lr(lr.lr, 2)} for {TITLES[method]} ({ends})")
    return (
        f"In reinforcement learning ({responses} responses a step, {steps} steps) the pooled learning rates are "
        f"{' and '.join(parts)}: sources of RL differ much, so sweep them."
    )


def _too_large(title: str, gpu: str, large: TooLargeError) -> str:
    """Say that a method does not fit, and why more GPUs don't help, or that they do."""
    needed, undivided, available = (size / GB for size in (large.needed, large.undivided, large.available))
    more = "only still more GPUs would do"
    if undivided > available:
        more = (
            f"more GPUs don't help, since {undivided:.0f} GB are not divided among them: activations, logits and whole "
            "layers"
        )
    return (
        f"{title} does not fit on {gpu}, which has {available:.0f} GB to give: each of {_MOST_GPUS:,} GPUs would need "
        f"{needed:.0f} GB; {more}. The other settings hold all the same."
    )


def _notes(model: UserModel, rank: int, steps: float, completion_tokens: float | None) -> list[str]:
    notes = []
    if steps < SHORT_STEPS:
        notes.append(
            f"The run has {steps:.0f} steps. Below {SHORT_STEPS} the paper gives an optimal LR of LoRA of "
            f"about {SHORT_RATIO:g} times that of FullFT, in place of 10."
        )
    if model.sizes.hidden < SMALLEST_WIDTH and covered(model.family):
        notes.append(
            f"Width {model.sizes.hidden} is below the widths that the law was shown for: its form is an extrapolation."
        )
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
    notes.append("`lorabench init` writes a preset that measures these settings on your own data.")
    return notes


def _bills(
    model: UserModel,
    data: UserData | None,
    completion_tokens: float | None,
    examples: int,
    batch: int,
    rank: int,
    gpu: str,
) -> dict[str, Cost | TooLargeError]:
    """Estimate the cost of one run of each method for an epoch, as a preset with these two runs would cost.

    Activations are recomputed where a method then needs fewer GPUs. In place of the bill of a method that fits on no
    number of GPUs stands the error that says so.
    """
    mean = data.mean_tokens if data else (completion_tokens or _ASSUMED_TOKENS) / examples
    longest = data.max_chars if data else _ASSUMED_MAX_CHARS
    # The estimate reads no data, so a dataset of the hub can stand for any other.
    sizes = {"train": examples, "validation": 1, "test": 1, "max_chars": max(32, longest)}
    raw = {
        "description": "costs of a recommendation",
        "models": {"m": model.spec.model_dump()},
        "datasets": {"d": {"kind": "hub", "id": "own/data", "mean_tokens": max(1, round(mean)), **sizes}},
        "protocol": {"precision": "bf16"},
        "experiments": {
            "rank": [
                {
                    "models": ["m"],
                    "datasets": ["d"],
                    "ranks": {"all": [rank]},
                    "batch_sizes": [batch],
                    "lrs": {"fullft": [1e-4], "lora": [1e-3]},
                    "seeds": 1,
                }
            ]
        },
        "margins": DEFAULT_MARGINS.model_dump(),
        "execution": {
            "gpu": gpu,
            "max_gpus": _MOST_GPUS,
            "max_batch_tokens": _MICRO_BATCH_TOKENS,
            "activation_checkpointing": "auto",
        },
    }
    plan = make_plan(parse_preset(raw, Path("recommendation")))
    bills: dict[str, Cost | TooLargeError] = {}
    for sweep in plan.sweeps:
        try:
            bills[sweep.condition.method] = job_cost(plan, Job((sweep,)))
        except TooLargeError as large:
            bills[sweep.condition.method] = large
    return bills


def recommendation_table(recommendation: Recommendation, data: UserData | None) -> None:
    """Print the settings with their sources, the optimal LRs of published and of your own runs, and the notes."""
    print(recommendation.model)
    if data is not None:
        print(data)
    settings = []
    for setting in recommendation.settings:
        value = setting.value if isinstance(setting.value, str) else f"{setting.value:,}"
        if setting.name.endswith("_lr"):
            value = f"{formats.lr(float(setting.value))} ({_interval(setting.low, setting.high, 2)})"
        settings.append((setting.what, value, setting.source))
    print_table(("setting", "value", "source"), settings)
    print_table(("LRs rest on", "widths", "LoRA", "weight", "FullFT", "weight"), _sources(recommendation))
    if recommendation.seen:
        rows = []
        for seen in recommendation.seen:
            arm = "FullFT" if seen.method == "fullft" else f"LoRA r{seen.rank}"
            rows.append((arm, formats.lr(seen.lr), _interval(seen.low, seen.high), seen.where))
        print_table(("optimal LR of", "LR", "95% interval", "source"), rows)
    for note in recommendation.notes:
        print(f"- {note}")


def _sources(recommendation: Recommendation) -> Iterable[tuple[str, ...]]:
    """Return a row for each source, the heaviest first, and one for the law alone."""

    def cells(share: SourceShare | None) -> tuple[str, str]:
        if share is None:
            return formats.DASH, formats.DASH
        lrs = formats.lr(share.low, 2) if share.low == share.high else _interval(share.low, share.high, 2)
        return lrs, f"{round(share.weight, 2) + 0.0:.0%}"

    by_method = {lr.method: {share.source: share for share in lr.sources} for lr in recommendation.lrs}
    shares = [share for lr in recommendation.lrs for share in lr.sources]
    widths = {share.source: share.widths for share in reversed(shares)}
    names = dict.fromkeys(share.source for share in shares)
    weights = {name: sum(share.weight for share in shares if share.source == name) for name in names}
    for name in sorted(names, key=lambda source: -weights[source]):
        yield (name, widths[name], *cells(by_method["lora"].get(name)), *cells(by_method["fullft"].get(name)))
    law = {lr.method: formats.lr(lr.law) for lr in recommendation.lrs}
    yield ("the law alone", "", law["lora"], "", law["fullft"], "")


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"{formats.lr(low, digits)} to {formats.lr(high, digits)}"


def script(recommendation: Recommendation, data: UserData | None, chat_template: str | None) -> str:
    """Return a Python script that trains the model with transformers and PEFT.

    Args:
        recommendation: the model and its settings.
        data: the training data; None leaves a placeholder for their path.
        chat_template: a preset's setting for a model without its own template.

    Raises:
        UserError: the script does not support the model or the data.
    """
    model = recommendation.model
    if model.sizes.experts:
        raise UserError(f"{model.name} is a mixture of experts, which the script does not cover; use `lorabench init`")
    if isinstance(model.spec, GgufModel):
        raise UserError(
            f"{model.name} is a GGUF file; the script needs safetensors: `lorabench step convert` makes them"
        )
    settings: dict[str, object] = {
        "MODEL": model_location(model.spec),
        "CHAT_TEMPLATE": template_text(chat_template) if chat_template else None,
        "RANK": recommendation.rank,
        "LORA_LR": recommendation.setting("lora_lr").value,
        "FULL_LR": recommendation.setting("fullft_lr").value,
        "BATCH_SIZE": recommendation.batch_size,
        "MAX_TOKENS": min(_MAX_TOKENS, model.max_length or _MAX_TOKENS),
    }
    if data is not None:
        if data.source["kind"] != "file":
            raise UserError(f"data {data.name} is on the hub; the script reads a file")
        unsupported = {reason: rows for reason, rows in data.tally.bad.items() if reason not in (TOO_LONG, REPEATED)}
        if unsupported:
            reasons = replace(data.tally, bad=unsupported).reasons()
            raise UserError(f"{data.name} has rows that the script would not leave out: {reasons}; remove them")
        settings |= {"DATA": data.name, "FORMAT": data.source["format"]}
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, value in settings.items():
        # The comment after the value is kept.
        [line] = re.findall(rf"^{name} = .*$", text, re.MULTILINE)
        comment = "".join(line.partition("  # ")[1:])
        text = text.replace(f"{line}\n", f"{name} = {value!r}{comment}\n")
    return text
