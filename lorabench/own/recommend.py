"""`lorabench recommend`: settings to start from for a model and so much data, each with where it comes from.

The law is for Llama and Qwen; for other families there is a range, not a number. What your own finished presets
measured on a model of the same family and sizes, and what others published of it, stands beside the law.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.arms import is_rl
from lorabench.analysis.recipe import Choice, recipe
from lorabench.bill import Bill, training
from lorabench.config import parse_preset
from lorabench.errors import UserError
from lorabench.gpus import GB
from lorabench.own import advice
from lorabench.own.data import Data
from lorabench.own.model import Model
from lorabench.own.preset import checked_gpu
from lorabench.plan import Job, make_plan
from lorabench.published import optimum, sweep_of, sweeps
from lorabench.tables import read_table, table_path, with_all_columns
from lorabench.utils import formats

LAW = "the paper's law with its authors' constants, fitted at batch size 128 (tinker-cookbook)"
PAPER = "the paper"
DOCS = "the authors' rule: a LoRA parameter for each scored token, and 32 by default"
# Without data, of which costs are told.
_SOME_TOKENS = 1_000_000
_SOME_EXAMPLE_TOKENS = 500
_SOME_LONGEST_CHARS = 6000
# At once through the model, so that activations are not what decides.
_MICRO_BATCH_TOKENS = 2048
# A model of a table is the one that is asked about if its parameters agree but for so much.
_AGREE = 0.02


@dataclass(frozen=True)
class Setting:
    """One recommendation."""

    name: str
    what: str
    value: float | int | str | None
    """None where there is only a range."""
    source: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Seen:
    """An optimal LR that somebody's runs found, LoRA on all layers or full fine-tuning."""

    method: str
    rank: int | None
    lr: float
    low: float | None
    high: float | None
    where: str


@dataclass(frozen=True)
class Recommendation:
    """All that is said of a model and data."""

    model: Model
    rank: int
    batch_size: int
    settings: tuple[Setting, ...]
    seen: tuple[Seen, ...]
    notes: tuple[str, ...]

    def setting(self, name: str) -> Setting:
        """The setting of that name."""
        return next(setting for setting in self.settings if setting.name == name)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        model = self.model
        return {
            "model": {
                "name": model.name,
                "family": model.family,
                "parameters": model.parameters,
                "hidden_size": model.sizes.hidden,
            },
            "settings": {one.name: {k: v for k, v in asdict(one).items() if k != "name"} for one in self.settings},
            "seen": [asdict(one) for one in self.seen],
            "notes": list(self.notes),
        }


def recommend(
    model: Model, completion_tokens: float | None, data: Data | None, gpu: str, results: Path = Path("results")
) -> Recommendation:
    """Settings for one model.

    Args:
        completion_tokens: scored tokens of the training data; None if not known.
        data: the data themselves, if they were looked at.
        gpu: a name of lorabench/gpus.py, for the costs.
        results: folder of finished presets.

    Raises:
        UserError: the GPU is not known.
    """
    examples = data.usable if data else math.ceil((completion_tokens or _SOME_TOKENS) / _SOME_EXAMPLE_TOKENS)
    batch = advice.batch_size(examples)
    hidden = model.sizes.hidden
    rank = advice.recommended_rank(hidden, model.lora_parameters(1), completion_tokens)
    lrs = [_lr(model, "lora"), _lr(model, "fullft")]
    settings = [
        *lrs,
        Setting("rank", "LoRA rank", rank, DOCS),
        Setting("lora_parameters", "LoRA parameters", model.lora_parameters(rank), "counted"),
        Setting("placement", "layers with LoRA", "all, and the unembedding", f"{PAPER}: attention alone is worse"),
        Setting("alpha", "alpha, at every rank", advice.ALPHA, PAPER),
        Setting("schedule", "learning rate over time", "constant, no warm-up", PAPER),
        Setting("batch_size", "batch size", batch, f"{PAPER}: both methods do best at small ones, LoRA above all"),
    ]
    bills = _bills(model, data, completion_tokens, examples, batch, rank, checked_gpu(gpu))
    of = "an epoch" if data or completion_tokens else "a million tokens"
    for method, title in (("lora", "LoRA"), ("fullft", "FullFT")):
        bill = bills[method]
        how = f"estimated for {bill.gpus} x {gpu}"
        settings.append(Setting(f"{method}_gigabytes", f"{title}, GB on each GPU", round(bill.memory / GB, 2), how))
        settings.append(
            Setting(f"{method}_gpu_hours", f"{title}, GPU-hours of {of}", float(f"{bill.gpu_hours:.2g}"), how)
        )
    seen = (*_measured(model, results), *_published(model.name, rank))
    return Recommendation(
        model, rank, batch, tuple(settings), seen, tuple(_notes(model, rank, batch, examples, completion_tokens))
    )


def _lr(model: Model, method: str) -> Setting:
    found = advice.law_lr(model.family, model.sizes.hidden, method)
    what = f"{'LoRA' if method == 'lora' else 'FullFT'} learning rate"
    if found.value is None:
        source = f"the law does not cover {model.family!r}; half a decade around what it says of Llama and Qwen"
        return Setting(f"{method}_lr", what, None, source, _digits(found.low), _digits(found.high))
    return Setting(f"{method}_lr", what, _digits(found.value), LAW)


def _digits(number: float) -> float:
    return float(f"{number:.4g}")


def _notes(model: Model, rank: int, batch: int, examples: int, completion_tokens: float | None) -> list[str]:
    notes = []
    scale = math.sqrt(batch / advice.LAW_BATCH)
    notes.append(
        f"The law was fitted at batch size {advice.LAW_BATCH}. By the authors' rule of thumb the LR goes with the "
        f"square root of the batch size: at {batch} that is {scale:.2g} times as much."
    )
    if (steps := examples // batch) < advice.SHORT_STEPS:
        notes.append(
            f"An epoch has {steps} steps. Below {advice.SHORT_STEPS} the paper found a LoRA optimum of about "
            f"{advice.SHORT_RATIO:g} times that of FullFT, in place of 10."
        )
    if model.sizes.hidden < advice.SMALLEST_WIDTH and advice.covered(model.family):
        notes.append(f"Width {model.sizes.hidden} is below what the law is known to hold for: an extrapolation.")
    if completion_tokens is not None:
        parameters = model.lora_parameters(rank)
        if parameters < completion_tokens:
            notes.append(
                f"Rank {rank} has {parameters:,} parameters for {completion_tokens:,.0f} scored tokens, and is as high "
                "as is sensible here: LoRA may run out of capacity; compare with full fine-tuning."
            )
        # A token holds about a bit, a parameter about two (paper notes, 3.1).
        notes.append(
            f"About {formats.amount(completion_tokens, 'bit')} in the data at a bit a token (what learning them by "
            f"heart takes; generalising takes less), {formats.amount(2 * parameters, 'bit')} in the adapter at two "
            "bits a parameter."
        )
    notes.append("`lorabench init` writes a preset that measures all this on your own data.")
    return notes


def _bills(
    model: Model,
    data: Data | None,
    completion_tokens: float | None,
    examples: int,
    batch: int,
    rank: int,
    gpu: str,
) -> dict[str, Bill]:
    """One run of each method, an epoch long, priced as a preset of its own would be."""
    mean = data.mean_tokens if data else (completion_tokens or _SOME_TOKENS) / examples
    longest = data.max_chars if data else _SOME_LONGEST_CHARS
    # The estimate reads no data; so a dataset of the hub stands for any.
    sizes = {"train": examples, "validation": 1, "test": 1, "max_chars": max(32, longest)}
    raw = {
        "description": "priced",
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
        "execution": {"gpu": gpu, "max_gpus": 1024, "max_batch_tokens": _MICRO_BATCH_TOKENS},
    }
    preset = parse_preset(raw, Path("recommendation"))
    plan = make_plan(preset)
    return {sweep.condition.method: training(plan, [Job((sweep,))]) for sweep in plan.sweeps}


def _measured(model: Model, results: Path) -> list[Seen]:
    """Optima of supervised runs on such a model, in the tables of presets that lie in a folder."""
    found = []
    for folder in sorted(results.glob("*/tables")):
        if table_path(folder, "runs") is None:
            continue
        try:
            measured = recipe(_of_model(with_all_columns(read_table(folder, "runs"), "runs"), model))
        except UserError:
            # A table that can't be trusted says nothing; `lorabench claims` says what is wrong with it.
            continue
        for one in measured.found:
            place = one.place
            where = f"measured, {folder.parent}: {place.dataset}, batch {place.batch_size}, {place.steps} steps"
            answer = {"yes": "LoRA matches", "no": "LoRA does not match", "undecided": "undecided whether LoRA matches"}
            found += [_of_choice("fullft", one.fullft, where)]
            found += [_of_choice("lora", one.use, f"{where}; {answer[one.answer]}")]
    return found


def _of_model(runs: pd.DataFrame, model: Model) -> pd.DataFrame:
    """The supervised runs on a model of the same family, width and size."""
    size = (runs["base_params"].astype(float) / model.parameters - 1).abs() < _AGREE
    width = runs["hidden_size"].astype(float) == model.sizes.hidden
    return runs[size & width & (runs["family"] == model.family).fillna(False).astype(bool) & ~is_rl(runs)]


def _published(model: str, rank: int) -> list[Seen]:
    """Optima that others published: of full fine-tuning, and of LoRA on all layers at the nearest rank."""
    found = []
    for dataset in sorted(sweeps()["dataset"].unique()):
        table = sweep_of(model, dataset)
        for (source, method), arms in table.groupby(["source", "method"]):
            grid = arms.sort_values("lr")
            if method == "lora":
                on_all = grid[grid["placement"] == "all"]
                nearest = min(on_all["rank"], key=lambda other: abs(math.log2(other / rank)))
                grid = on_all[on_all["rank"] == nearest]
            best = int(grid["nll"].to_numpy().argmin())
            inside = 0 < best < len(grid) - 1
            edge = "; at the edge of its grid" if len(grid) > 1 and not inside else ""
            lr = optimum(grid) if inside else float(grid["lr"].iloc[best])
            of_rank = int(grid["rank"].iloc[0]) if method == "lora" else None
            found.append(Seen(str(method), of_rank, _digits(lr), None, None, f"published, {source}: {dataset}{edge}"))
    return found


def _of_choice(method: str, choice: Choice, where: str) -> Seen:
    low, high = (None if pd.isna(end) else _digits(end) for end in (choice.lr_low, choice.lr_high))
    edge = "" if choice.resolved else "; not resolved"
    return Seen(method, choice.rank, _digits(choice.lr_opt), low, high, where + edge)
