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
from dataclasses import asdict, dataclass, field, replace
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
_STATED_ERROR = math.log(10) / 2 / math.sqrt(12)
LEAST_ERROR = math.log(1.15)
"""The least error of a fitted optimum: no fit is better than this factor in the LR, whatever its interval says."""
# The law and the sweep of its authors are of 100,000 examples at batch size 128; the widths of the law's models.
_LAW_BATCH, _SWEEP_STEPS = 128.0, 780.0
_LAW_WIDTHS = {"llama": (2048, 4096, 8192), "qwen": (1024, 2560, 4096)}


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
    optima = [optimum for study in studies for optimum in _of_study(study)]
    optima += [*_of_authors(), *_stated({study.of.name for study in studies})]
    # A condition that several figures or presets show counts once.
    own: dict[tuple[Any, ...], LrOptimum] = {}
    for optimum in (optimum for folder in presets for optimum in _of_preset(folder)):
        own.setdefault((optimum.model, optimum.dataset, optimum.batch_size, optimum.steps, optimum.method), optimum)
    return optima + list(own.values())


def _of_study(study: Study) -> list[LrOptimum]:
    """Return the optima of a study: for each condition of FullFT, and of LoRA's highest rank with a grid."""
    described, alpha = study.described, study.of.source.attributes.alpha
    optima = []
    for runs in study.conditions():
        first = runs.iloc[0]
        about = LrOptimum(
            source=study.of.name,
            model=study.model,
            family=described.family or "",
            dataset=str(first["dataset"]),
            width=float(described.hidden_size or NAN),
            batch_size=_number(first["batch_size"]),
            steps=_number(first["steps"]),
            # An alpha may also be a rule, in place of a number.
            alpha=float(pd.to_numeric(alpha, errors="coerce")),
            rl=study.is_rl,
        )
        fullft, lora = (runs[runs["method"] == method] for method in ("fullft", "lora"))
        if fullft["lr"].nunique() >= MIN_LRS:
            optima.append(_of_grid(fullft, replace(about, method="fullft", alpha=ALPHA)))
        ranks = [int(str(rank)) for rank, arm in lora.groupby("rank") if arm["lr"].nunique() >= MIN_LRS]
        if ranks:
            highest = max(ranks)
            optima.append(_of_grid(lora[lora["rank"] == highest], replace(about, method="lora", rank=highest)))
    return optima


def _of_grid(arm: pd.DataFrame, about: LrOptimum) -> LrOptimum:
    """Return the optimum of an arm's grid, given what is known of it besides LR, error, counts and remark."""
    cells = arm.assign(lost=~arm["status"].eq("done"), loss=arm["loss"].astype(float)).groupby(arm["lr"].astype(float))
    grid = cells.agg(loss=("loss", "mean"), lost=("lost", "any"))
    logs, losses = np.log(grid.index.to_numpy(float)), grid["loss"].to_numpy(float)
    lost = grid["lost"].to_numpy(bool) | ~np.isfinite(losses)
    lrs = grid.index.tolist()
    lr = lowest(dict(zip(lrs, np.where(lost, math.inf, losses).tolist(), strict=True)))
    best = 0 if lr is None else lrs.index(lr)
    inside = 0 < best < len(logs) - 1
    log_lr, error = float(logs[best]), NAN
    if inside:
        around = slice(best - 1, best + 2)
        error = float(logs[best + 1] - logs[best - 1]) / 2 / math.sqrt(12)
        if not lost[around].any():
            log_lr = vertex(logs[around], losses[around])
    known = np.isfinite(losses)
    remark = f"grid of {len(logs)} LRs" if inside else "the best LR is at the edge of its grid"
    grid_known: dict[str, Any] = {"log_lrs": tuple(logs[known].tolist()), "losses": tuple(losses[known].tolist())}
    return replace(about, lr=_rounded(math.exp(log_lr)), error=error, counts=inside, remark=remark, **grid_known)


def _of_authors() -> list[LrOptimum]:
    """Return the published sweep of the paper's authors, and their law at some widths of its models."""
    optima = []
    authors = LrOptimum(AUTHORS, batch_size=_LAW_BATCH, alpha=ALPHA)
    table = published_sweeps()
    for model, sweep in table[table["source"] == "tinker-cookbook"].groupby("model"):
        first, rank = sweep.iloc[0], int(sweep["rank"].max())
        runs = sweep[sweep["rank"] == rank].rename(columns={"nll": "loss"}).assign(status="done")
        # The source tried 3e-3 with every model, and leaves out the runs that ended above 2 nats.
        if runs["lr"].max() < 3e-3:
            runs = pd.concat([runs, pd.DataFrame([{"lr": 3e-3, "loss": NAN, "status": "diverged"}])])
        about = replace(authors, model=str(model), family=str(first["family"]), dataset=str(first["dataset"]),
                        method="lora", rank=rank, width=float(first["hidden_size"]), steps=_SWEEP_STEPS)  # fmt: skip
        optima.append(_of_grid(runs, about))
    for family, widths in _LAW_WIDTHS.items():
        for width in widths:
            for method in ("fullft", "lora"):
                law = replace(authors, model=f"{family} {width}", family=family, dataset="law", method=method,
                              width=float(width))  # fmt: skip
                optima.append(_as_stated(law, predict_lr(LAW, family, width, method)))
    return optima


def _stated(names: set[str]) -> list[LrOptimum]:
    """Return the optima of published tables that have no grid, of other sources than those named."""
    optima = []
    sweeps = published_sweeps()
    sweeps = sweeps[(sweeps["source"] == "michaelbzhu") & (sweeps["placement"].fillna("all") == "all")]
    for method, arm in sweeps.groupby("method"):
        highest = arm.sort_values("rank").iloc[-1]
        about = LrOptimum(
            source="michaelbzhu",
            model=str(highest["model"]),
            family=str(highest["family"]),
            dataset=str(highest["dataset"]),
            method=str(method),
            rank=None if pd.isna(highest["rank"]) else int(highest["rank"]),
            width=float(highest["hidden_size"]),
            batch_size=32.0,
            steps=200.0,
            alpha=ALPHA,
        )
        optima.append(_as_stated(about, float(highest["lr"])))
    for row in published_ratios().to_dict("records"):
        source = str(row["source"])
        if any(source.casefold().startswith(name) for name in names):
            continue
        for method in ("fullft", "lora"):
            low, high = float(row[f"{method}_lr_low"]), float(row[f"{method}_lr_high"])
            if low > 0 and high > 0:
                about = LrOptimum(
                    source=source.split(" arXiv")[0],
                    model=str(row["model"]),
                    family=_family(row["model"]),
                    method=method,
                    width=math.sqrt(row["width_low"] * row["width_high"]),
                    steps=_number(row["steps"]),
                    alpha=ALPHA if method == "fullft" else _number(row["alpha"]),
                    rl=row["task"] == "rl",
                )
                spread = math.log(high / low) / math.sqrt(12)
                optima.append(_as_stated(about, math.sqrt(low * high), spread))
    return optima


def _as_stated(about: LrOptimum, lr: float, spread: float = 0.0) -> LrOptimum:
    error = math.hypot(_STATED_ERROR, spread)
    return replace(about, lr=_rounded(lr), error=error, counts=True, remark="as stated by the source")


def _of_preset(folder: Path) -> list[LrOptimum]:
    """Return the fitted optima of a preset's published figures: LRs by rank, of RL, by condition, and by model.

    Optima at another alpha than ALPHA are left out, since only this project has them and `ALPHA_EXPONENT` stands for
    them.
    """
    models = load_preset(folder.name).models

    def fitted(row: Any, method: str, lr: float, error: float, rl: bool = False, **grid: Any) -> LrOptimum:
        spec = models.get(row["model"])
        if spec is None:
            raise UserError(
                f"{folder}: model {row['model']!r} is none of the preset {folder.name}: {', '.join(models)}"
            )
        family = ""
        if isinstance(spec, TinyModel):
            family = json.loads((shipped_folder(spec.name) / "config.json").read_text())["model_type"]
        elif isinstance(spec, HubModel):
            family = _family(spec.id.rsplit("/", 1)[-1])
        return LrOptimum(
            source=PROJECT,
            model=row["model"],
            family=family,
            dataset=row["dataset"],
            method=method,
            rank=None if method == "fullft" or pd.isna(row["rank"]) else int(row["rank"]),
            width=float(dimensions(spec).hidden),
            batch_size=float(row["batch_size"]),
            steps=float(row["steps"]),
            alpha=ALPHA,
            rl=rl,
            lr=_rounded(float(lr)),
            error=max(LEAST_ERROR, error),
            counts=True,
            remark="fitted" if row["resolved"] else "fitted, not resolved",
            **grid,
        )

    def table(figure: str) -> pd.DataFrame:
        path = folder / f"{figure}.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["element", "runs", "alpha", *_CONDITION])

    optima = []
    for figure, value, rl in (("fig2_lr_by_rank", "nll", False), ("fig6_rl_lr", "accuracy", True)):
        for _, arms in table(figure).groupby(_CONDITION):
            with_interval = arms[(arms["element"] == "optimum") & arms["lr_low"].notna()]
            for method, rows in with_interval.groupby("method"):
                row = rows.sort_values("rank").iloc[-1]
                grid = arms[(arms["element"] == ("accuracy" if rl else "loss")) & (arms["arm"] == row["arm"])]
                grid = grid[np.isfinite(grid[value])].sort_values("lr")
                losses = tuple(map(float, 1 - grid[value] if rl else grid[value]))
                error = math.log(row["lr_high"] / row["lr_low"]) / (2 * Z)
                log_lrs = tuple(np.log(grid["lr"]).tolist())
                optima.append(fitted(row, str(method), row["lr"], error, rl, log_lrs=log_lrs, losses=losses))
    ratios = table("lr_ratio")
    own = ratios[(ratios["element"] == "condition") & (ratios["runs"] == "own") & (ratios["alpha"] == ALPHA)]
    for _, row in own.drop_duplicates(_CONDITION).iterrows():
        # The two optima share the error of their ratio.
        error = math.log(row["ratio_high"] / row["ratio_low"]) / (2 * Z) / math.sqrt(2)
        optima += [fitted(row, method, row[f"{method}_lr"], error) for method in ("fullft", "lora")]
    law = table("lr_law")
    for _, row in law[law["element"] == "optimum"].iterrows():
        error = math.log(row["lr_high"] / row["lr_low"]) / (2 * Z)
        optima.append(fitted(row, str(row["method"]), row["lr"], error))
    return optima


_CONDITION = ["model", "dataset", "batch_size", "steps"]


def optima_table(optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Return optima as a table, one row each, without their grids."""
    names = [name for name in LrOptimum.__dataclass_fields__ if name not in ("log_lrs", "losses")]
    return pd.DataFrame([asdict(optimum) for optimum in optima], columns=names).astype({"rank": "Int64"})


def optima_of_table(table: pd.DataFrame) -> list[LrOptimum]:
    """Return the optima of a table, the inverse of `optima_table`; a column of text may be null for an empty text."""
    texts = ["source", "model", "family", "dataset", "method", "remark"]
    table = table.assign(**{name: table[name].astype(object).fillna("") for name in texts})
    return [
        LrOptimum(
            **{str(name): row[name] for name in row} | {"rank": None if pd.isna(row["rank"]) else int(row["rank"])}
        )
        for row in table.to_dict("records")
    ]


def _number(value: Any) -> float:
    return NAN if pd.isna(value) else float(value)


def _family(model: str) -> str:
    """Return the family of a model that is not shipped, the beginning of its name."""
    return lineage(model.split("-")[0].split()[0])


def _rounded(lr: float) -> float:
    return lr if math.isnan(lr) else float(f"{lr:.4g}")
