"""The optimal learning rates that are known: of the sources, of published tables, of published presets, and the law's.

An optimum of a grid is the lowest point of the parabola in ln LR through the best LR and its neighbours, or the best LR
where a neighbour diverged. Its standard error is that of a uniform distribution over one step of the grid, since most
sources have one seed. An optimum at the edge of its grid does not count. LoRA is that of the highest rank whose grid
has three LRs. Optima without a grid, which a source states, get the error of a grid with half-decade steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.lr_law import lineage, predict_lr
from lorabench.analysis.pooled_lr import ALPHA_EXPONENT, Optimum, Place
from lorabench.analysis.published import published_ratios, published_sweeps, vertex
from lorabench.config.inputs import HubModel, TinyModel
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions, shipped_folder
from lorabench.runs import lowest
from lorabench.sources.measurements import PROJECT, Z
from lorabench.sources.studies import Study

AUTHORS = "the paper's authors"
"""The law and the published sweep of its authors are one source, since the law was fitted to such sweeps."""

NAN = math.nan
LEAST_ERROR = math.log(1.15)
"""The least error of a fitted optimum: no fit is better than this factor in the LR, whatever its interval says."""

_LAW_WIDTHS = {"llama": (2048, 4096, 8192), "qwen": (1024, 2560, 4096)}
"""Widths of the models that the law was fitted to."""

_CONDITION = ["model", "dataset", "batch_size", "steps"]


@dataclass(frozen=True)
class LrOptimum:
    """One known optimal LR, with its place; NaN where the source does not say."""

    source: str
    model: str = ""
    family: str = ""
    dataset: str = ""
    method: str = ""
    rank: int | None = None
    width: float = NAN
    batch_size: float = NAN
    """Examples per step; in RL, responses per step."""
    steps: float = NAN
    alpha: float = NAN
    rl: bool = False
    lr: float = NAN
    error: float = NAN
    """The standard error of ln LR; NaN where the optimum is at the edge of its grid."""
    counts: bool = False
    remark: str = ""
    log_lrs: tuple[float, ...] = field(default=(), repr=False)
    """The grid where it is known: ln LR in ascending order."""
    losses: tuple[float, ...] = field(default=(), repr=False)
    """The losses of the grid, error rates in RL."""

    @property
    def shift(self) -> float:
        """What to add to ln LR to state it at ALPHA."""
        known = self.method == "lora" and math.isfinite(self.alpha)
        return -ALPHA_EXPONENT * math.log(self.alpha / ALPHA) if known else 0.0

    @property
    def pooled(self) -> Optimum:
        """The optimum for pooling, at ALPHA."""
        unknown = self.method == "lora" and math.isnan(self.alpha)
        error = math.hypot(self.error, ALPHA_EXPONENT * math.log(2) if unknown else 0.0)
        return Optimum(self.source, self.model, self.place, math.log(self.lr) + self.shift, error)

    @property
    def place(self) -> Place:
        """Where the optimum lies: family, width, method, batch size and steps."""
        return Place.at(self.family, self.width, self.method, self.batch_size, self.steps)


def known_optima(studies: Sequence[Study], presets: Sequence[Path] = ()) -> list[LrOptimum]:
    """Return all known optima.

    Args:
        studies: those of the sources.
        presets: folders of published presets, such as paper_figures/published/laptop.

    Raises:
        UserError: a figure's table names a model that the preset does not have.
    """
    optima = [optimum for study in studies for optimum in _study_optima(study)]
    optima += [*_authors_optima(), *_stated_optima({study.origin.name for study in studies})]
    # A condition that several figures or presets show counts once.
    own: dict[tuple[Any, ...], LrOptimum] = {}
    for folder in presets:
        for optimum in _preset_optima(folder):
            own.setdefault((*(getattr(optimum, name) for name in _CONDITION), optimum.method), optimum)
    return optima + list(own.values())


def _study_optima(study: Study) -> list[LrOptimum]:
    """Return the optima of a study: for each condition of FullFT, and of LoRA's highest rank with a grid."""
    optima = []
    for runs in study.conditions():
        first = runs.iloc[0]
        about = LrOptimum(
            source=study.origin.name,
            model=study.model,
            family=study.about.family or "",
            dataset=str(first["dataset"]),
            width=float(study.about.hidden_size or NAN),
            batch_size=_number(first["batch_size"]),
            steps=_number(first["steps"]),
            # An alpha may also be a rule, in place of a number.
            alpha=float(pd.to_numeric(study.origin.source.attributes.alpha, errors="coerce")),
            rl=study.is_rl,
        )
        fullft = runs[runs["method"] == "fullft"]
        if fullft["lr"].nunique() >= MIN_LRS:
            optima.append(_grid_optimum(fullft, replace(about, method="fullft", alpha=ALPHA)))
        lora = runs[runs["method"] == "lora"].groupby("rank").filter(lambda arm: arm["lr"].nunique() >= MIN_LRS)
        if len(lora):
            highest = lora[lora["rank"] == lora["rank"].max()]
            optima.append(_grid_optimum(highest, replace(about, method="lora", rank=int(lora["rank"].max()))))
    return optima


def _grid_optimum(arm: pd.DataFrame, about: LrOptimum) -> LrOptimum:
    """Return the optimum of an arm's grid, given what is known of it besides LR, error, counts and remark."""
    cells = arm.assign(lost=~arm["status"].eq("done"), loss=arm["loss"].astype(float)).groupby(arm["lr"].astype(float))
    grid = cells.agg(loss=("loss", "mean"), lost=("lost", "any"))
    lrs, losses = grid.index.tolist(), grid["loss"].to_numpy(float)
    logs, known = np.log(lrs), np.isfinite(losses)
    lost = grid["lost"].to_numpy(bool) | ~known
    lr = lowest(dict(zip(lrs, np.where(lost, math.inf, losses).tolist(), strict=True)))
    best = 0 if lr is None else lrs.index(lr)
    inside = 0 < best < len(logs) - 1
    log_lr, error = float(logs[best]), NAN
    if inside:
        around = slice(best - 1, best + 2)
        error = float(logs[best + 1] - logs[best - 1]) / 2 / math.sqrt(12)
        if not lost[around].any():
            log_lr = float(vertex(logs[around], losses[around]))
    return replace(
        about,
        lr=rounded(math.exp(log_lr)),
        error=error,
        counts=inside,
        remark=f"grid of {len(logs)} LRs" if inside else "the best LR is at the edge of its grid",
        log_lrs=tuple(logs[known].tolist()),
        losses=tuple(losses[known].tolist()),
    )


def _authors_optima() -> list[LrOptimum]:
    """Return the published sweep of the paper's authors, and their law at some widths of its models."""
    optima = []
    # Both are of 100,000 examples at batch size 128.
    authors = LrOptimum(AUTHORS, batch_size=128.0, alpha=ALPHA)
    table = published_sweeps()
    for model, sweep in table[table["source"] == "tinker-cookbook"].groupby("model"):
        first, rank = sweep.iloc[0], int(sweep["rank"].max())
        runs = sweep[sweep["rank"] == rank].rename(columns={"nll": "loss"}).assign(status="done")
        # The source tried 3e-3 with every model, and leaves out the runs that ended above 2 nats.
        if runs["lr"].max() < 3e-3:
            runs = pd.concat([runs, pd.DataFrame([{"lr": 3e-3, "loss": NAN, "status": "diverged"}])])
        about = replace(authors, model=str(model), family=str(first["family"]), dataset=str(first["dataset"]),
                        method="lora", rank=rank, width=float(first["hidden_size"]), steps=780.0)  # fmt: skip
        optima.append(_grid_optimum(runs, about))
    for family, widths in _LAW_WIDTHS.items():
        for width in widths:
            place = replace(authors, model=f"{family} {width}", family=family, dataset="law", width=float(width))
            for method in ("fullft", "lora"):
                optima.append(_stated(replace(place, method=method), predict_lr(LAW, family, width, method)))
    return optima


def _stated_optima(names: set[str]) -> list[LrOptimum]:
    """Return the optima of published tables that have no grid, of other sources than those named."""
    optima = []
    sweeps = published_sweeps()
    sweeps = sweeps[(sweeps["source"] == "michaelbzhu") & (sweeps["placement"].fillna("all") == "all")]
    for method, arm in sweeps.groupby("method"):
        highest = arm.sort_values("rank").iloc[-1]
        about = LrOptimum(
            source="michaelbzhu",
            model=highest["model"],
            family=highest["family"],
            dataset=highest["dataset"],
            method=str(method),
            rank=None if pd.isna(highest["rank"]) else int(highest["rank"]),
            width=float(highest["hidden_size"]),
            batch_size=32.0,
            steps=200.0,
            alpha=ALPHA,
        )
        optima.append(_stated(about, float(highest["lr"])))
    for row in published_ratios().to_dict("records"):
        for method in ("fullft", "lora"):
            low, high = row[f"{method}_lr_low"], row[f"{method}_lr_high"]
            if pd.isna(low) or row["source"].casefold().startswith(tuple(names)):
                continue
            about = LrOptimum(
                source=row["source"].split(" arXiv")[0],
                model=row["model"],
                family=_family(row["model"]),
                method=method,
                width=math.sqrt(row["width_low"] * row["width_high"]),
                steps=_number(row["steps"]),
                alpha=ALPHA if method == "fullft" else _number(row["alpha"]),
                rl=row["task"] == "rl",
            )
            optima.append(_stated(about, math.sqrt(low * high), math.log(high / low) / math.sqrt(12)))
    return optima


def _stated(about: LrOptimum, lr: float, spread: float = 0.0) -> LrOptimum:
    """Return an optimum without a grid, with the error of a grid of half-decade steps and that of a stated range."""
    error = math.hypot(math.log(10) / 2 / math.sqrt(12), spread)
    return replace(about, lr=rounded(lr), error=error, counts=True, remark="as stated by the source")


def _preset_optima(folder: Path) -> list[LrOptimum]:
    """Return the fitted optima of a preset's published figures: LRs by rank, of RL, by condition, and by model.

    Optima at another alpha than ALPHA are left out, since only this project has them and `ALPHA_EXPONENT` stands for
    them.
    """
    models, optima = load_preset(folder.name).models, []
    for figure, value in (("fig2_lr_by_rank", "nll"), ("fig6_rl_lr", "accuracy"), ("lr_ratio", ""), ("lr_law", "")):
        path = folder / f"{figure}.csv"
        if not path.is_file():
            continue
        table, grid = pd.read_csv(path), pd.DataFrame()
        if figure == "lr_ratio":
            at_alpha = (table["element"] == "condition") & (table["runs"] == "own") & (table["alpha"] == ALPHA)
            own = table[at_alpha].drop_duplicates(_CONDITION)
            # The two optima share the error of their ratio.
            own = own.assign(error=np.log(own["ratio_high"] / own["ratio_low"]) / (2 * Z) / math.sqrt(2))
            by_method = [own.assign(method=method, lr=own[f"{method}_lr"]) for method in ("fullft", "lora")]
            fitted = pd.concat(by_method).sort_index(kind="stable")
        else:
            fitted = table[(table["element"] == "optimum") & table["lr_low"].notna()]
            fitted = fitted.assign(error=np.log(fitted["lr_high"] / fitted["lr_low"]) / (2 * Z))
        if value:
            fitted = fitted.sort_values([*_CONDITION, "method", "rank"]).groupby([*_CONDITION, "method"]).tail(1)
            grid = table[(table["element"] == ("loss" if value == "nll" else value)) & np.isfinite(table[value])]
        for row in fitted.to_dict("records"):
            spec = models.get(row["model"])
            if spec is None:
                allowed = ", ".join(models)
                raise UserError(f"{folder}: model {row['model']!r} is none of the preset {folder.name}: {allowed}")
            family = _family(spec.id.rsplit("/", 1)[-1]) if isinstance(spec, HubModel) else ""
            if isinstance(spec, TinyModel):
                family = json.loads((shipped_folder(spec.name) / "config.json").read_text())["model_type"]
            points = grid
            if len(grid):
                same = [*_CONDITION, "arm"]
                points = grid[(grid[same] == [row[name] for name in same]).all(axis=1)].sort_values("lr")
            losses = points.get(value, pd.Series(dtype=float))
            optima.append(
                LrOptimum(
                    source=PROJECT,
                    model=row["model"],
                    family=family,
                    dataset=row["dataset"],
                    method=row["method"],
                    rank=None if row["method"] == "fullft" or pd.isna(row["rank"]) else int(row["rank"]),
                    width=float(dimensions(spec).hidden),
                    batch_size=float(row["batch_size"]),
                    steps=float(row["steps"]),
                    alpha=ALPHA,
                    rl=value == "accuracy",
                    lr=rounded(row["lr"]),
                    error=max(LEAST_ERROR, row["error"]),
                    counts=True,
                    remark="fitted" if row["resolved"] else "fitted, not resolved",
                    log_lrs=tuple(np.log(points.get("lr", losses)).tolist()),
                    losses=tuple((1 - losses if value == "accuracy" else losses).tolist()),
                )
            )
    return optima


def optima_table(optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Return optima as a table, one row each, without their grids."""
    names = [field.name for field in fields(LrOptimum) if field.name not in ("log_lrs", "losses")]
    return pd.DataFrame([asdict(optimum) for optimum in optima], columns=names).astype({"rank": "Int64"})


def optima_of_table(table: pd.DataFrame) -> list[LrOptimum]:
    """Return the optima of a table, the inverse of `optima_table`; a column of text may be null for an empty text."""
    texts = ["source", "model", "family", "dataset", "method", "remark"]
    table = table.assign(**{name: table[name].astype(object).fillna("") for name in texts})
    ranks = [None if pd.isna(rank) else int(rank) for rank in table["rank"]]
    rows = table.drop(columns="rank").to_dict("records")
    return [
        LrOptimum(**{str(name): row[name] for name in row}, rank=rank) for row, rank in zip(rows, ranks, strict=True)
    ]


def _number(value: Any) -> float:
    return NAN if pd.isna(value) else float(value)


def _family(model: str) -> str:
    """Return the family of a model that is not shipped, the beginning of its name."""
    return lineage(model.split("-")[0].split()[0])


def rounded(lr: float) -> float:
    """Return a learning rate to four digits."""
    return float(f"{lr:.4g}")
