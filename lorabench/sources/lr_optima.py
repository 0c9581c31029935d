"""The optimal learning rates that are known: of the sources, of published tables, of published presets, and the law's.

An optimum of a grid is the lowest point of the parabola in ln LR through the best LR and its neighbours, or the best LR
where a neighbour diverged. Its standard error is that of a uniform distribution over one step of the grid, since most
sources have one seed. An optimum at the edge of its grid does not count. LoRA is that of the highest rank whose grid
has three LRs. Optima without a grid, which a source states, get the error of a grid with half-decade steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.comparison import Judging
from lorabench.analysis.estimate import ExampleLosses
from lorabench.analysis.fit_rows import MIN_LRS
from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.lr_law import lineage, predict_lr
from lorabench.analysis.optima import mean_lr
from lorabench.analysis.published import published_ratios, published_sweeps, vertex
from lorabench.claims.recipe import measured_recipe
from lorabench.config.inputs import HubModel, TinyModel
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions, shipped_folder
from lorabench.runs import lowest
from lorabench.sources.measurements import PROJECT, Z
from lorabench.sources.source import SourceModel, at_usual_alpha
from lorabench.store.checks import is_rl
from lorabench.store.io import with_all_columns
from lorabench.store.tables import Tables

AUTHORS = "the paper's authors"
"""The law and the published sweep of its authors are one source, since the law was fitted to such sweeps."""

NAN = math.nan
LEAST_ERROR = math.log(1.15)
"""The least error of a fitted optimum: no fit is better than this factor in the LR, whatever its interval says."""
MOST_ERROR = math.log(10) / 3 / math.sqrt(12)
"""The largest error of an optimum that a preset found: that of its grid of three LRs a decade without a fit."""

_LAW_WIDTHS = {"llama": (2048, 4096, 8192), "qwen": (1024, 2560, 4096)}
"""Widths of the models that the law was fitted to."""

_CONDITION = ["model", "dataset", "batch_size", "steps"]
_NUMBERS = ("width", "batch_size", "steps", "alpha", "mean_lr", "lr", "error")


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
    batch_size: float = NAN  # Examples per step; in RL, responses per step.
    steps: float = NAN
    alpha: float = NAN
    rl: bool = False
    lr: float = NAN
    error: float = NAN  # The standard error of ln LR; NaN where the optimum is at the edge of its grid.
    counts: bool = False
    remark: str = ""
    mean_lr: float = 1.0  # The mean LR of a run over its highest.
    log_lrs: tuple[float, ...] = field(default=(), repr=False)  # The grid where it is known: ln LR in ascending order.
    losses: tuple[float, ...] = field(default=(), repr=False)  # The losses of the grid, error rates in RL.

    @classmethod
    def from_row(cls, row: Mapping[Any, Any]) -> LrOptimum:
        """Return the optimum of a table's row, whose LR is rounded; null stands for what the source does not say."""
        known: dict[str, Any] = {}
        for column in fields(cls):
            value: Any = row.get(column.name)
            if isinstance(value, tuple) or pd.notna(value):
                known[column.name] = float(value) if column.name in _NUMBERS else value
        if "rank" in known:
            known["rank"] = int(known["rank"])
        return cls(**known | {"lr": rounded(known["lr"])})


def known_optima(sources: Sequence[SourceModel], presets: Sequence[Path] = ()) -> list[LrOptimum]:
    """Return all known optima, also those of folders of published presets, such as paper_figures/published/laptop; a
    UserError says if a figure's table names a model that the preset does not have."""
    # Folders of one repository are one source, with the name that comes first.
    names = {
        source.file.origin.repository: source.folder
        for source in sorted(sources, key=lambda source: source.folder, reverse=True)
    }
    optima = [
        replace(optimum, source=names[source.file.origin.repository])
        for source in sources
        for optimum in _source_optima(source)
    ]
    optima += [*_authors_optima(), *_stated_optima({source.folder for source in sources})]
    # A condition that several figures or presets show counts once.
    own: dict[tuple[Any, ...], LrOptimum] = {}
    for optimum in (optimum for folder in presets for optimum in _preset_optima(folder)):
        own.setdefault((*(getattr(optimum, name) for name in _CONDITION), optimum.method), optimum)
    return optima + list(own.values())


def _source_optima(source: SourceModel) -> list[LrOptimum]:
    """Return the optima of a source: for each condition of FullFT, and of LoRA's highest rank with a grid."""
    attributes = source.file.attributes
    about: dict[str, Any] = {"source": source.folder, "family": source.about.family, "width": source.about.hidden_size}
    about |= {"mean_lr": mean_lr(attributes.schedule), "rl": source.is_rl}
    optima = []
    for runs in source.conditions():
        first = {name: runs[name].iloc[0] for name in _CONDITION} | about
        swept = runs[runs.groupby(["method", "rank"], dropna=False)["lr"].transform("nunique") >= MIN_LRS]
        fullft, lora = (swept[swept["method"] == method] for method in ("fullft", "lora"))
        if len(fullft):
            optima.append(grid_optimum(fullft, first | {"method": "fullft", "alpha": ALPHA}))
        if len(lora):
            lora = at_usual_alpha(lora)
            rank = lora["rank"].max()
            stated = lora.loc[lora["rank"] == rank, "alpha"].dropna()
            # The alpha of a source may also be a rule, in place of a number.
            alpha = pd.to_numeric(attributes.alpha, errors="coerce") if stated.empty else stated.iloc[0]
            of_lora = {"method": "lora", "alpha": alpha, "rank": rank}
            optima.append(grid_optimum(lora[lora["rank"] == rank], first | of_lora))
    return optima


def grid_optimum(arm: pd.DataFrame, about: Mapping[Any, Any]) -> LrOptimum:
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
            log_lr = vertex(logs[around], losses[around])
    remark = f"grid of {len(logs)} LRs" if inside else "the best LR is at the edge of its grid"
    optimum = {"lr": math.exp(log_lr), "error": error, "counts": inside, "remark": remark}
    points = {"log_lrs": tuple(logs[known].tolist()), "losses": tuple(losses[known].tolist())}
    return LrOptimum.from_row({**about, **optimum, **points})


def _authors_optima() -> list[LrOptimum]:
    """Return the published sweep of the paper's authors, and their law at some widths of its models."""
    optima = []
    # Both are of 100,000 examples at batch size 128.
    authors = {"source": AUTHORS, "batch_size": 128.0, "alpha": ALPHA}
    table = published_sweeps().rename(columns={"nll": "loss", "hidden_size": "width"})
    for _, sweep in table[table["source"] == "tinker-cookbook"].groupby("model"):
        runs = sweep[sweep["rank"] == sweep["rank"].max()].assign(status="done")
        about = runs.iloc[0].to_dict() | authors | {"steps": 780.0}
        # The source tried 3e-3 with every model, and leaves out the runs that ended above 2 nats.
        if runs["lr"].max() < 3e-3:
            runs = pd.concat([runs, pd.DataFrame([{"lr": 3e-3, "loss": NAN, "status": "diverged"}])])
        optima.append(grid_optimum(runs, about))
    for family, widths in _LAW_WIDTHS.items():
        for width, method in product(widths, ("fullft", "lora")):
            law = {"model": f"{family} {width}", "family": family, "dataset": "law", "width": width, "method": method}
            optima.append(_stated(authors | law | {"lr": predict_lr(LAW, family, width, method)}))
    return optima


def _stated_optima(names: set[str]) -> list[LrOptimum]:
    """Return the optima of published tables that have no grid, of other sources than those named."""
    sweeps = published_sweeps().rename(columns={"hidden_size": "width"})
    sweeps = sweeps[(sweeps["source"] == "michaelbzhu") & (sweeps["placement"].fillna("all") == "all")]
    highest = sweeps.sort_values(["method", "rank"]).groupby("method").tail(1)
    optima = [_stated(row) for row in highest.assign(batch_size=32, steps=200, alpha=ALPHA).to_dict("records")]
    for row in published_ratios().to_dict("records"):
        for method in ("fullft", "lora"):
            low, high = row[f"{method}_lr_low"], row[f"{method}_lr_high"]
            if pd.isna(low) or row["source"].casefold().startswith(tuple(names)):
                continue
            about = {
                "source": row["source"].split(" arXiv")[0],
                "family": _family(row["model"]),
                "method": method,
                "width": math.sqrt(row["width_low"] * row["width_high"]),
                "alpha": ALPHA if method == "fullft" else row["alpha"],
                "rl": row["task"] == "rl",
                "lr": math.sqrt(low * high),
            }
            optima.append(_stated(row | about, math.log(high / low) / math.sqrt(12)))
    return optima


def _stated(row: Mapping[Any, Any], spread: float = 0.0) -> LrOptimum:
    """Return an optimum without a grid, with the error of a grid of half-decade steps and that of a stated range."""
    error = math.hypot(math.log(10) / 2 / math.sqrt(12), spread)
    return LrOptimum.from_row({**row, "error": error, "counts": True, "remark": "as stated by the source"})


def _preset_optima(folder: Path) -> list[LrOptimum]:
    """Return the fitted optima of a preset's published figures: LRs by rank, of RL, by condition, and by model.

    Optima at another alpha than ALPHA are left out, since only this project has them and `ALPHA_EXPONENT` stands for
    them, and so are those with a frozen A or another initial scale of it.
    """
    models, optima = load_preset(folder.name).models, []
    arms, grids = [*_CONDITION, "arm"], pd.DataFrame()
    for figure, value in (("fig2_lr_by_rank", "nll"), ("fig6_rl_lr", "accuracy"), ("lr_ratio", ""), ("lr_law", "")):
        path = folder / f"{figure}.csv"
        if not path.is_file():
            continue
        table = pd.read_csv(path)
        if figure == "lr_ratio":
            usual = table["alpha"].eq(ALPHA)
            if "frozen" in table:
                usual &= table["init_a"].eq(1) & table["frozen"].astype(str).eq("False")
            conditions = table[usual & table["element"].eq("condition") & table["runs"].eq("own")]
            # Of several ranks the highest counts, as in the other figures.
            own = conditions.sort_values("rank", kind="stable").drop_duplicates(_CONDITION, keep="last").sort_index()
            # The two optima share the error of their ratio.
            own = own.assign(error=np.log(own["ratio_high"] / own["ratio_low"]) / (2 * Z) / math.sqrt(2))
            fullft = own.assign(method="fullft", lr=own["fullft_lr"], rank=None, arm="FullFT")
            lora = own.assign(method="lora", lr=own["lora_lr"], arm=[f"LoRA r{rank:g}" for rank in own["rank"]])
            fitted = pd.concat([fullft, lora]).sort_index(kind="stable")
        else:
            fitted = table[(table["element"] == "optimum") & table["lr_low"].notna()]
            fitted = fitted.assign(error=np.log(fitted["lr_high"] / fitted["lr_low"]) / (2 * Z))
        if value:
            # Rank 1, whose optimum is lower, does not stand for LoRA.
            fitted = fitted[~fitted["rank"].eq(1)].sort_values([*_CONDITION, "method", "rank"])
            fitted = fitted.groupby([*_CONDITION, "method"]).tail(1)
            points = table[(table["element"] == ("loss" if value == "nll" else value)) & np.isfinite(table[value])]
            losses = points[value] if value == "nll" else 1 - points[value]
            points = points.assign(log_lrs=np.log(points["lr"]), losses=losses).sort_values("lr")
            grids = pd.concat([grids, points.groupby(arms)[["log_lrs", "losses"]].agg(tuple)])
        if figure != "lr_law" and len(grids):
            fitted = fitted.join(grids, on=arms)
        for row in fitted.to_dict("records"):
            if (spec := models.get(row["model"])) is None:
                allowed = ", ".join(models)
                raise UserError(f"{folder}: model {row['model']!r} is none of the preset {folder.name}: {allowed}")
            family = _family(spec.id.rsplit("/", 1)[-1]) if isinstance(spec, HubModel) else ""
            if isinstance(spec, TinyModel):
                family = json.loads((shipped_folder(spec.name) / "config.json").read_text())["model_type"]
            about = {"source": PROJECT, "family": family, "width": dimensions(spec).hidden, "alpha": ALPHA}
            about |= {"rl": value == "accuracy", "counts": True}
            about["error"] = min(max(LEAST_ERROR, row["error"]), MOST_ERROR)
            remark = "fitted" if row["resolved"] else "fitted, not resolved"
            optima.append(LrOptimum.from_row(row | about | {"remark": remark}))
    return optima


def optima_table(optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Return optima as a table, one row each, without their grids."""
    table = pd.DataFrame([asdict(optimum) for optimum in optima], columns=[name.name for name in fields(LrOptimum)])
    return table.drop(columns=["log_lrs", "losses"]).astype({"rank": "Int64"})


def measured_optima(tables: Tables) -> pd.DataFrame:
    """Return the optimal LRs of supervised runs, of FullFT and of the LoRA to use, which `lora-advice` reads.

    There are the columns of `optima_table`, without a source, the ends `lr_low` and `lr_high` of the 95% interval, the
    number of the model's `parameters`, what identifies its `weights`, and whether LoRA `matches`. An optimum without an
    interval does not count. Runs without a family or a width are left out.
    """
    runs = with_all_columns(tables.runs, "runs")
    runs = runs[~is_rl(runs) & runs["family"].notna() & runs["hidden_size"].notna()]
    judging, rows = Judging(examples=ExampleLosses.of(tables.test_losses)), []
    for _, group in runs.groupby(["family", "hidden_size", "base_params", "model_sha256"], dropna=False):
        first = group.iloc[0]
        weights = "" if pd.isna(first["model_sha256"]) else str(first["model_sha256"])
        about = {"family": first["family"], "width": first["hidden_size"], "alpha": ALPHA, "weights": weights}
        for recipe in measured_recipe(group, tables.curves, judging):
            about |= {name: recipe.setting[name] for name in ("dataset", "batch_size", "steps")}
            about |= {"model": weights or recipe.setting["model"], "parameters": first["base_params"]}
            for method, choice, matches in (("fullft", recipe.fullft, ""), ("lora", recipe.use, recipe.answer)):
                lr, low, high = choice.lr_opt, choice.lr_low, choice.lr_high
                counts = lr > 0 and low > 0 and math.isfinite(high)
                row = {"method": method, "rank": choice.rank, "rl": False, "lr": lr, "lr_low": low, "lr_high": high}
                row["error"] = max(LEAST_ERROR, math.log(high / low) / (2 * Z)) if counts else NAN
                row |= {"counts": counts, "remark": "fitted" if choice.resolved else "fitted, not resolved"}
                rows.append(about | row | {"matches": matches})
    return pd.DataFrame(rows)


def _family(model: str) -> str:
    """Return the family of a model that is not shipped, the beginning of its name."""
    return lineage(model.split("-")[0].split()[0])


def rounded(lr: float) -> float:
    """Return a learning rate to four digits."""
    return float(f"{lr:.4g}")
