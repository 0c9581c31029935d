"""The learning rates to start from for a model, pooled from known optima (`analysis.pooled_lr`) and measured on it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
from pydantic import TypeAdapter

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import Judging
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.lr_law import PUBLISHED, lineage
from lorabench.analysis.pooled_lr import Place, PooledLr
from lorabench.analysis.published import interpolated_optimum, published_sweeps, sweep_of
from lorabench.claims.recipe import measured_recipe
from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, model_catalogue
from lorabench.custom.model import UserModel
from lorabench.errors import UserError
from lorabench.models.base import weights_sha256
from lorabench.runs import lowest
from lorabench.sources.lr_optima import LEAST_ERROR, LrOptimum, optima_of_table
from lorabench.sources.measurements import PROJECT, Z
from lorabench.store.checks import is_rl
from lorabench.store.io import table_path, with_all_columns
from lorabench.store.tables import Tables
from lorabench.utils.files import LR_OPTIMA

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
    optima: Sequence[LrOptimum],
    family: str,
    width: int,
    method: str,
    batch_size: float,
    steps: float,
    rl: bool = False,
    same: Collection[tuple[str, str]] = (),
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
        same: the sources and names of models that are this very model, not one of its family and width alone.

    Returns:
        The LR with the ends of the interval of PROBABILITY for the optimum of a source that nobody has seen, and the
        sources that it rests on.
    """
    chosen = [optimum for optimum in optima if optimum.counts and (optimum.method, optimum.rl) == (method, rl)]
    place = Place.at(family, width, method, batch_size, steps)
    named = ((optimum.source, optimum.model) for optimum in reversed(chosen))
    measured = next((pair for pair in named if pair in same), None)
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


def _recorded_as(model: ModelSpec) -> str:
    """Return how runs record what identifies a model, as JSON; of a model of the hub the beginning, without the commit.

    A preset may name a branch of the hub, and the id says enough.
    """
    weights = weights_sha256(model)
    text = json.dumps(weights, sort_keys=True)
    return text.partition(": ")[0] if isinstance(model, HubModel) else text if weights else "unknown"


def _named_by_project(model: UserModel, optima: Sequence[LrOptimum]) -> Iterator[tuple[str, str]]:
    """Yield the source and name under which this project's own optima have a model: that of the shipped catalogue."""
    widths = {optimum.model: optimum.width for optimum in optima if optimum.source == PROJECT}
    for name in (name for name, width in widths.items() if width == model.sizes.hidden):
        known = TypeAdapter[ModelSpec](ModelSpec).validate_python(model_catalogue()[name])
        if isinstance(known, GgufModel):
            same = isinstance(model.spec, GgufModel) and model.spec.sha256 == known.sha256
        else:
            same = _recorded_as(model.spec) == _recorded_as(known)
        if same:
            yield PROJECT, name


def known_optima(model: UserModel, results: Path) -> tuple[list[SeenOptimum], list[LrOptimum], set[tuple[str, str]]]:
    """Return the published optimal LRs, and those of supervised runs in the tables of finished presets.

    Returns:
        Those of finished presets for a model of the same family and size, to be shown; all of them, to be pooled; and
        the sources and names by which they have this very model.
    """
    pooled = optima_of_table(pd.read_csv(LR_OPTIMA))
    same = set(_named_by_project(model, pooled))
    recorded_as = cache(lambda: _recorded_as(model.spec))
    recipes = []
    for folder in sorted(results.glob("*/tables")):
        if table_path(folder, "runs") is None:
            continue
        try:
            tables = Tables.read(folder)
            runs = with_all_columns(tables.runs, "runs")
            runs = runs[~is_rl(runs) & runs["family"].notna() & runs["hidden_size"].notna()]
            judging = Judging(examples=ExampleLosses.of(tables.test_losses))
            groups = runs.groupby(["family", "hidden_size", "base_params", "model_sha256"], dropna=False)
            recipes += [
                (folder.parent, rows.iloc[0], recipe)
                for _, rows in groups
                for recipe in measured_recipe(rows, tables.curves, judging).recommendations
            ]
        except UserError:
            # A table that is not valid is skipped here; `lorabench claims` says what is wrong with it.
            continue
    seen: list[SeenOptimum] = []
    for preset, run, recipe in recipes:
        shared, same_size = recipe.setting, abs(float(run["base_params"]) / model.parameters - 1) < _SAME_SIZE
        is_shown = (run["family"], run["hidden_size"]) == (model.family, model.sizes.hidden) and same_size
        name = shared["model"] if pd.isna(run["model_sha256"]) else str(run["model_sha256"])
        if is_same := is_shown and name.startswith(recorded_as()):
            same.add((OWN, name))
        where = f"measured{'' if is_same else ' on another model of this size'}, {preset}: {shared['dataset']}, "
        where += f"batch {shared['batch_size']}, {shared['steps']} steps"
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
                        model=name,
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
    return seen, pooled, same


def published_optima(model: UserModel, rank: int) -> list[SeenOptimum]:
    """Return published optimal LRs of full fine-tuning, and of LoRA on all layers at the nearest rank."""
    # Whether the files of a folder are those of the published model is not known.
    optima, named = [], "" if isinstance(model.spec, HubModel) else " for a model of this name"
    for dataset in sorted(published_sweeps()["dataset"].unique()):
        for (source, method), arms in sweep_of(model.name, dataset).groupby(["source", "method"]):
            grid, grid_rank = arms.sort_values("lr"), None
            if method == "lora":
                grid = grid[grid["placement"] == "all"]
                grid_rank = int(min(grid["rank"], key=lambda other: abs(math.log2(other / rank))))
                grid = grid[grid["rank"] == grid_rank]
            best = lowest(dict(zip(grid["lr"], grid["nll"], strict=True))) or math.nan
            inside = grid["lr"].min() < best < grid["lr"].max()
            edge = "; at the edge of its grid" if len(grid) > 1 and not inside else ""
            lr = _rounded(interpolated_optimum(grid) if inside else best)
            where = f"published{named}, {source}: {dataset}{edge}"
            optima.append(SeenOptimum(str(method), grid_rank, lr, None, None, where))
    return optima


def _rounded(lr: float) -> float:
    return float(f"{lr:.4g}")
