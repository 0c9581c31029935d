"""Settings to start from for a model and an amount of data (`lorabench recommend`), each with its source.

The learning rates are pooled from all optima that are known: of published sources, of the paper's law as one of them,
and of your own finished presets (`learning_rates`). What your presets measured on a model of the same family and size,
and what others published for it, is shown next to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.config.loading import parse_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.custom import advice
from lorabench.custom.data import UserData
from lorabench.custom.learning_rates import (
    PROBABILITY,
    RecommendedLr,
    SeenOptimum,
    measured_optima,
    outside,
    published_optima,
    recommended_lr,
)
from lorabench.custom.model import UserModel
from lorabench.custom.preset import checked_gpu
from lorabench.errors import UserError
from lorabench.planning.bill import Bill, training
from lorabench.planning.memory import TooLargeError
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.sources.lr_optima import LrOptimum, optima_of_table
from lorabench.utils import formats
from lorabench.utils.files import LR_OPTIMA
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
    batch = batch_size or advice.batch_size(examples)
    if data and batch > examples:
        raise UserError(f"batch size {batch} is more than the {examples} training examples")
    examples = max(examples, batch)
    length = float(steps or (max(1, examples // batch) if data or completion_tokens else math.nan))
    hidden = model.sizes.hidden
    why = "your choice" if batch_size else f"{PAPER}: both methods do best at small batches, LoRA above all"
    rank = advice.recommended_rank(hidden, model.lora_parameters(1), completion_tokens)
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
        Setting("alpha", "alpha, at every rank", advice.ALPHA, PAPER),
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
    responses, steps = advice.GROUP_SIZE * advice.PROBLEMS_PER_STEP, min(advice.RL_STEPS)
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
    if steps < advice.SHORT_STEPS:
        notes.append(
            f"The run has {steps:.0f} steps. Below {advice.SHORT_STEPS} the paper gives an optimal LR of LoRA of "
            f"about {advice.SHORT_RATIO:g} times that of FullFT, in place of 10."
        )
    if model.sizes.hidden < advice.SMALLEST_WIDTH and advice.covered(model.family):
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
) -> dict[str, Bill | TooLargeError]:
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
    bills: dict[str, Bill | TooLargeError] = {}
    for sweep in plan.sweeps:
        try:
            bills[sweep.condition.method] = training(plan, [Job((sweep,))])
        except TooLargeError as large:
            bills[sweep.condition.method] = large
    return bills
