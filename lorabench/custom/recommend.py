"""Settings to start from for a model and an amount of data (`lorabench recommend`), each with its source.

The paper's law of learning rates covers Llama and Qwen; for other families the recommendation is a range. The optimal
learning rates that your own finished presets measured on a model of the same family and size, and the ones that others
published for it, are shown beside the law.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.comparison import Judging
from lorabench.analysis.example_losses import ExampleLosses
from lorabench.analysis.published import interpolated_optimum, published_sweeps, sweep_of
from lorabench.claims.recipe import Choice, MeasuredRecipe, measured_recipe
from lorabench.config.loading import parse_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.custom import advice
from lorabench.custom.data import UserData
from lorabench.custom.model import UserModel
from lorabench.custom.preset import checked_gpu
from lorabench.errors import UserError
from lorabench.planning.bill import Bill, training
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.tables.checks import is_rl
from lorabench.tables.io import read_table, table_path, with_all_columns
from lorabench.tables.tables import Tables
from lorabench.utils import formats
from lorabench.utils.gpus import GB

LAW = "the paper's law with its authors' constants, fitted at batch size 128 (tinker-cookbook)"
PAPER = "the paper"
DOCS = "the authors' rule: a LoRA parameter for each scored token, and 32 by default"
# The amount of data to estimate costs for if the user names none.
_ASSUMED_TOKENS = 1_000_000
_ASSUMED_EXAMPLE_TOKENS = 500
_ASSUMED_MAX_CHARS = 6000
# Tokens that go through the model at once: few, so that activations do not decide the number of GPUs.
_MICRO_BATCH_TOKENS = 2048
# A table's model counts as the same if its number of parameters differs by less than this share.
_SAME_SIZE = 0.02


@dataclass(frozen=True)
class Setting:
    """One recommended setting."""

    name: str
    what: str
    """The setting's name for a reader."""
    value: float | int | str | None
    """The recommended value; None if only a range from `low` to `high` is recommended."""
    source: str
    """Where the value comes from."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SeenOptimum:
    """An optimal LR that was measured, by your own runs or in a publication: LoRA on all layers, or FullFT."""

    method: str
    rank: int | None
    lr: float
    low: float | None
    high: float | None
    where: str
    """The source, with dataset, batch size and steps where they are known."""


@dataclass(frozen=True)
class Recommendation:
    """The recommended settings for a model and its data, the optimal LRs seen so far, and notes."""

    model: UserModel
    rank: int
    batch_size: int
    settings: tuple[Setting, ...]
    seen: tuple[SeenOptimum, ...]
    notes: tuple[str, ...]

    def setting(self, name: str) -> Setting:
        """Return the setting of a name."""
        return next(setting for setting in self.settings if setting.name == name)

    def plain(self) -> dict[str, Any]:
        """Return the recommendation as plain data for JSON."""
        model = self.model
        return {
            "model": {
                "name": model.name,
                "family": model.family,
                "parameters": model.parameters,
                "hidden_size": model.sizes.hidden,
            },
            "settings": {
                setting.name: {field: value for field, value in asdict(setting).items() if field != "name"}
                for setting in self.settings
            },
            "seen": [asdict(seen) for seen in self.seen],
            "notes": list(self.notes),
        }


def recommend(
    model: UserModel, completion_tokens: float | None, data: UserData | None, gpu: str, results: Path = Path("results")
) -> Recommendation:
    """Recommend settings for a model.

    Args:
        model: the model.
        completion_tokens: the number of scored tokens of the training data; None if unknown.
        data: the examined data; None if only their size, or nothing, is known.
        gpu: the GPU to estimate costs for, a name of lorabench/utils/gpus.py.
        results: the folder of finished presets.

    Raises:
        UserError: the GPU is not known.
    """
    examples = data.usable if data else math.ceil((completion_tokens or _ASSUMED_TOKENS) / _ASSUMED_EXAMPLE_TOKENS)
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
        Setting("batch_size", "batch size", batch, f"{PAPER}: both methods do best at small batches, LoRA above all"),
    ]
    bills = _bills(model, data, completion_tokens, examples, batch, rank, checked_gpu(gpu))
    amount = "an epoch" if data or completion_tokens else "a million tokens"
    for method, title in (("lora", "LoRA"), ("fullft", "FullFT")):
        bill = bills[method]
        source = f"estimated for {bill.gpus} x {gpu}"
        settings.append(Setting(f"{method}_gigabytes", f"{title}, GB on each GPU", round(bill.memory / GB, 2), source))
        settings.append(
            Setting(f"{method}_gpu_hours", f"{title}, GPU-hours of {amount}", float(f"{bill.gpu_hours:.2g}"), source)
        )
    seen = (*_measured(model, results), *_published(model.name, rank))
    return Recommendation(
        model, rank, batch, tuple(settings), seen, tuple(_notes(model, rank, batch, examples, completion_tokens))
    )


def _lr(model: UserModel, method: str) -> Setting:
    lr = advice.law_lr(model.family, model.sizes.hidden, method)
    what = f"{'LoRA' if method == 'lora' else 'FullFT'} learning rate"
    if lr.value is None:
        source = f"the law does not cover {model.family!r}; half a decade around its LRs for Llama and Qwen"
        return Setting(f"{method}_lr", what, None, source, _four_digits(lr.low), _four_digits(lr.high))
    return Setting(f"{method}_lr", what, _four_digits(lr.value), LAW)


def _four_digits(number: float) -> float:
    return float(f"{number:.4g}")


def _notes(model: UserModel, rank: int, batch: int, examples: int, completion_tokens: float | None) -> list[str]:
    notes = []
    scale = math.sqrt(batch / advice.LAW_BATCH)
    notes.append(
        f"The law was fitted at batch size {advice.LAW_BATCH}. By the authors' rule of thumb the LR is proportional to "
        f"the square root of the batch size: at {batch} it is {scale:.2g} times the law's."
    )
    if (steps := examples // batch) < advice.SHORT_STEPS:
        notes.append(
            f"An epoch has {steps} steps. Below {advice.SHORT_STEPS} the paper gives an optimal LR of LoRA of "
            f"about {advice.SHORT_RATIO:g} times that of FullFT, in place of 10."
        )
    if model.sizes.hidden < advice.SMALLEST_WIDTH and advice.covered(model.family):
        notes.append(f"Width {model.sizes.hidden} is below the widths that the law was shown for: an extrapolation.")
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
) -> dict[str, Bill]:
    """Estimate the cost of one run of each method for an epoch, as a preset with these two runs would cost."""
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
        "execution": {"gpu": gpu, "max_gpus": 1024, "max_batch_tokens": _MICRO_BATCH_TOKENS},
    }
    preset = parse_preset(raw, Path("recommendation"))
    plan = make_plan(preset)
    return {sweep.condition.method: training(plan, [Job((sweep,))]) for sweep in plan.sweeps}


def _measured(model: UserModel, results: Path) -> list[SeenOptimum]:
    """Return the optimal LRs of supervised runs on the same model in the tables of finished presets."""
    optima: list[SeenOptimum] = []
    for folder in sorted(results.glob("*/tables")):
        if table_path(folder, "runs") is None:
            continue
        try:
            measured = _recipe_of(folder, model)
        except UserError:
            # A table that is not valid is skipped here; `lorabench claims` says what is wrong with it.
            continue
        for recommendation in measured.recommendations:
            shared = recommendation.setting
            where = f"measured, {folder.parent}: {shared.dataset}, batch {shared.batch_size}, {shared.steps} steps"
            answer = {"yes": "LoRA matches", "no": "LoRA does not match", "undecided": "undecided whether LoRA matches"}
            optima.append(_seen("fullft", recommendation.fullft, where))
            optima.append(_seen("lora", recommendation.use, f"{where}; {answer[recommendation.answer]}"))
    return optima


def _recipe_of(folder: Path, model: UserModel) -> MeasuredRecipe:
    runs = _of_model(with_all_columns(read_table(folder, "runs"), "runs"), model)
    if runs.empty:
        return MeasuredRecipe((), ())
    tables = Tables.read(folder)
    return measured_recipe(runs, tables.curves, Judging(examples=ExampleLosses.of(tables.test_losses)))


def _of_model(runs: pd.DataFrame, model: UserModel) -> pd.DataFrame:
    """Return the supervised runs on a model of the same family, width and size."""
    size = (runs["base_params"].astype(float) / model.parameters - 1).abs() < _SAME_SIZE
    width = runs["hidden_size"].astype(float) == model.sizes.hidden
    return runs[size & width & (runs["family"] == model.family).fillna(False).astype(bool) & ~is_rl(runs)]


def _published(model: str, rank: int) -> list[SeenOptimum]:
    """Return published optimal LRs of full fine-tuning, and of LoRA on all layers at the nearest rank."""
    optima = []
    for dataset in sorted(published_sweeps()["dataset"].unique()):
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
            lr = interpolated_optimum(grid) if inside else float(grid["lr"].iloc[best])
            grid_rank = int(grid["rank"].iloc[0]) if method == "lora" else None
            optima.append(
                SeenOptimum(
                    str(method), grid_rank, _four_digits(lr), None, None, f"published, {source}: {dataset}{edge}"
                )
            )
    return optima


def _seen(method: str, choice: Choice, where: str) -> SeenOptimum:
    low, high = (None if pd.isna(end) else _four_digits(end) for end in (choice.lr_low, choice.lr_high))
    edge = "" if choice.resolved else "; not resolved"
    return SeenOptimum(method, choice.rank, _four_digits(choice.lr_opt), low, high, where + edge)
