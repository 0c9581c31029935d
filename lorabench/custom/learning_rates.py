"""The learning rates to start from for a model, pooled from known optima (`analysis.pooled_lr`) and measured on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import Judging
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.lr_law import PUBLISHED, lineage
from lorabench.analysis.pooled_lr import Place, PooledLr
from lorabench.analysis.published import interpolated_optimum, published_sweeps, sweep_of
from lorabench.claims.recipe import measured_recipe
from lorabench.custom.model import UserModel
from lorabench.errors import UserError
from lorabench.runs import lowest
from lorabench.sources.lr_optima import LEAST_ERROR, LrOptimum
from lorabench.sources.measurements import PROJECT, Z
from lorabench.store.checks import is_rl
from lorabench.store.io import table_path, with_all_columns
from lorabench.store.tables import Tables

OWN = "your own presets"
"""The name of the optima that the user's finished presets measured, as one source."""

PROBABILITY = 0.8
"""The probability that the optimal LR of a further source lies in the recommended interval."""

# An attribute is outside of the evidence if the nearest value with evidence is further away than this factor.
_NEAR = 2.0
# A table's model counts as the same if its number of parameters differs by less than this share.
_SAME_SIZE = 0.02
_MATCHES = {
    "yes": "; LoRA matches",
    "no": "; LoRA does not match",
    "undecided": "; undecided whether LoRA matches",
}


@dataclass(frozen=True)
class SourceShare:
    """A source that a recommended LR rests on."""

    source: str
    widths: str
    """The hidden sizes of its models, such as `64 to 256`."""
    low: float
    """The lowest of its optimal LRs, of LoRA at alpha 32."""
    high: float
    weight: float
    """By how much ln of the recommended LR rises if all ln LRs of the source rise by 1."""


@dataclass(frozen=True)
class LrSources:
    """What a recommended LR rests on."""

    law: float
    """The LR of the law alone; of a family without an exponent, in the middle of its families."""
    measured_by: str | None
    """The source that measured this very model, whose deviation is then part of the recommendation."""
    sources: tuple[SourceShare, ...]
    """The sources, the heaviest first."""


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


def recommended_lr(
    optima: Sequence[LrOptimum], family: str, width: int, method: str, batch_size: float, steps: float, rl: bool = False
) -> tuple[tuple[float, float, float], LrSources]:
    """Recommend the LR of a method for a model.

    Args:
        optima: all that are known, of both methods and tasks; the user's own come last.
        family: the transformers model type.
        width: the hidden size.
        method: `lora` or `fullft`.
        batch_size: examples per step; in RL, responses per step.
        steps: NaN if they are not known.
        rl: whether the runs are of RL.

    Returns:
        The LR with the ends of the interval of PROBABILITY for the optimum of a source that nobody has seen, and the
        sources that it rests on.
    """
    chosen = [optimum for optimum in optima if optimum.counts and (optimum.method, optimum.rl) == (method, rl)]
    place, measured = Place.at(family, width, method, batch_size, steps), None
    for optimum in chosen:
        same = optimum.width == width and lineage(optimum.family) == lineage(family)
        if same and optimum.source in (OWN, PROJECT):
            measured = (optimum.source, optimum.model)
    predicted = PooledLr([optimum.pooled for optimum in chosen]).predict(place, PROBABILITY, measured)
    shares = []
    for source, weight in sorted(predicted.weights.items(), key=lambda item: -abs(round(item[1], 3))):
        own = [optimum for optimum in chosen if optimum.source == source]
        lrs = [math.exp(optimum.pooled.log_lr) for optimum in own]
        widths = sorted({optimum.width for optimum in own if math.isfinite(optimum.width)})
        ends = " to ".join(f"{end:.0f}" for end in dict.fromkeys((*widths[:1], *widths[-1:])))
        share = SourceShare(source, ends or "not known", _rounded(min(lrs)), _rounded(max(lrs)), round(weight, 3))
        shares.append(share)
    logs = (predicted.mean, predicted.low, predicted.high, place.log_law)
    lr, low, high, law = (_rounded(math.exp(log)) for log in logs)
    return (lr, low, high), LrSources(law, measured[0] if measured else None, tuple(shares))


def outside(optima: Sequence[LrOptimum], family: str, width: int, batch_size: float, steps: float) -> list[str]:
    """Return a sentence for each thing that no source of SFT has measured: family, width, batch size or length."""
    sentences = []
    if lineage(family) not in PUBLISHED.exponents:
        names = " and ".join(name.capitalize() for name in PUBLISHED.exponents)
        sentences.append(
            f"The law has no exponent for the family {family!r}: the learning rates rest on the middle of those of "
            f"{names}, and their intervals are wider for it."
        )
    asked = {"width": ("width", width), "batch_size": ("batch size", batch_size), "steps": ("length, in steps,", steps)}
    for field, (name, value) in asked.items():
        measured = (getattr(optimum, field) for optimum in optima if optimum.counts and not optimum.rl)
        known = sorted(other for other in measured if math.isfinite(other / value))
        nearest = min(known, key=lambda other: abs(math.log(other / value)), default=value)
        if max(nearest / value, value / nearest) > _NEAR:
            sentences.append(
                f"No source has measured a {name} near {value:,.0f}; the nearest is {nearest:,.0f}, so the learning "
                "rates are an extrapolation and their intervals may be too narrow."
            )
    return sentences


def measured_optima(model: UserModel, results: Path) -> tuple[list[SeenOptimum], list[LrOptimum]]:
    """Return the optimal LRs of supervised runs in the tables of finished presets.

    Returns:
        Those of the same model, to be shown, and those of all models, to be pooled.
    """
    recipes = []
    for folder in sorted(results.glob("*/tables")):
        if table_path(folder, "runs") is None:
            continue
        try:
            tables = Tables.read(folder)
            runs = with_all_columns(tables.runs, "runs")
            runs = runs[~is_rl(runs) & runs["family"].notna() & runs["hidden_size"].notna()]
            judging = Judging(examples=ExampleLosses.of(tables.test_losses))
            groups = runs.groupby(["family", "hidden_size", "base_params"])
            recipes += [
                (folder.parent, rows.iloc[0], recipe)
                for _, rows in groups
                for recipe in measured_recipe(rows, tables.curves, judging).recommendations
            ]
        except UserError:
            # A table that is not valid is skipped here; `lorabench claims` says what is wrong with it.
            continue
    seen: list[SeenOptimum] = []
    pooled: list[LrOptimum] = []
    for preset, run, recipe in recipes:
        shared, same_size = recipe.setting, abs(float(run["base_params"]) / model.parameters - 1) < _SAME_SIZE
        is_shown = (run["family"], run["hidden_size"]) == (model.family, model.sizes.hidden) and same_size
        where = f"measured, {preset}: {shared['dataset']}, batch {shared['batch_size']}, {shared['steps']} steps"
        for method, choice, remark in (("fullft", recipe.fullft, ""), ("lora", recipe.use, _MATCHES[recipe.answer])):
            lr, low, high = choice.lr_opt, choice.lr_low, choice.lr_high
            if is_shown:
                first, last = (None if pd.isna(end) else _rounded(end) for end in (low, high))
                edge = "" if choice.resolved else "; not resolved"
                seen.append(SeenOptimum(method, choice.rank, _rounded(lr), first, last, f"{where}{remark}{edge}"))
            if lr > 0 and low > 0 and math.isfinite(high):
                pooled.append(
                    LrOptimum(
                        source=OWN,
                        model=shared["model"],
                        family=str(run["family"]),
                        dataset=shared["dataset"],
                        method=method,
                        rank=choice.rank,
                        width=float(run["hidden_size"]),
                        batch_size=float(shared["batch_size"]),
                        steps=math.nan if shared["steps"] is None else float(shared["steps"]),
                        alpha=ALPHA,
                        lr=lr,
                        error=max(LEAST_ERROR, math.log(high / low) / (2 * Z)),
                        counts=True,
                        remark="fitted" if choice.resolved else "fitted, not resolved",
                    )
                )
    return seen, pooled


def published_optima(model: str, rank: int) -> list[SeenOptimum]:
    """Return published optimal LRs of full fine-tuning, and of LoRA on all layers at the nearest rank."""
    optima = []
    for dataset in sorted(published_sweeps()["dataset"].unique()):
        for (source, method), arms in sweep_of(model, dataset).groupby(["source", "method"]):
            grid, grid_rank = arms.sort_values("lr"), None
            if method == "lora":
                grid = grid[grid["placement"] == "all"]
                grid_rank = int(min(grid["rank"], key=lambda other: abs(math.log2(other / rank))))
                grid = grid[grid["rank"] == grid_rank]
            best = lowest(dict(zip(grid["lr"], grid["nll"], strict=True))) or math.nan
            inside = grid["lr"].min() < best < grid["lr"].max()
            edge = "; at the edge of its grid" if len(grid) > 1 and not inside else ""
            lr = _rounded(interpolated_optimum(grid) if inside else best)
            where = f"published, {source}: {dataset}{edge}"
            optima.append(SeenOptimum(str(method), grid_rank, lr, None, None, where))
    return optima


def _rounded(lr: float) -> float:
    return float(f"{lr:.4g}")
