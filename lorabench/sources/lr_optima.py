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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.analysis.comparison import MIN_LRS
from lorabench.analysis.lr_grid import vertex
from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.lr_law import lineage, predict_lr
from lorabench.analysis.pooled_lr import ALPHA, ALPHA_EXPONENT, Optimum, Place
from lorabench.analysis.published import published_ratios, published_sweeps
from lorabench.config.loading import load_preset
from lorabench.config.models import HubModel, ModelSpec, TinyModel
from lorabench.errors import UserError
from lorabench.models.dimensions import dimensions
from lorabench.models.tiny import shipped_folder
from lorabench.sources.measurements import Z
from lorabench.sources.own import PROJECT
from lorabench.sources.studies import Study
from lorabench.store.checks import is_rl

AUTHORS = "the paper's authors"
"""The law and the published sweep of its authors are one source, since the law was fitted to such sweeps."""

NAN = math.nan
_HALF_DECADE = math.log(10) / 2
LEAST_ERROR = math.log(1.15)
"""The least error of a fitted optimum: no fit is better than this factor in the LR, whatever its interval says."""
# The law and the sweep of its authors are of 100,000 examples at batch size 128; the widths of the law's models.
_LAW_BATCH, _SWEEP_STEPS = 128.0, 780.0
_LAW_WIDTHS = {"llama": (2048, 4096, 8192), "qwen": (1024, 2560, 4096)}


@dataclass(frozen=True)
class LrOptimum:
    """One known optimal LR, with its place; NaN where the source does not say."""

    source: str
    model: str
    family: str
    dataset: str
    method: str
    rank: int | None
    width: float
    batch_size: float
    """Examples per step; in RL, responses per step."""
    steps: float
    alpha: float
    rl: bool
    lr: float
    error: float
    """The standard error of ln LR; NaN where the optimum is at the edge of its grid."""
    counts: bool
    remark: str

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
        return Place.at(self.family, self.width, self.method, self.batch_size, self.steps)


@dataclass(frozen=True)
class SweptOptimum:
    """A known optimum with the losses of its grid, where they are known; error rates in RL."""

    optimum: LrOptimum
    log_lrs: tuple[float, ...]
    losses: tuple[float, ...]


def known_optima(studies: Sequence[Study], presets: Sequence[Path] = ()) -> list[SweptOptimum]:
    """Return all known optima.

    Args:
        studies: those of the sources.
        presets: folders of published presets, such as paper_figures/published/laptop.
    """
    names = {study.of.name for study in studies}
    optima = [swept for study in studies for swept in _of_study(study)]
    optima += [*_of_authors(), *_stated(names)]
    # A condition that several figures or presets show counts once.
    own: dict[tuple[Any, ...], SweptOptimum] = {}
    for swept in (swept for folder in presets for swept in _of_preset(folder)):
        of = swept.optimum
        own.setdefault((of.model, of.dataset, of.batch_size, of.steps, of.method), swept)
    return optima + list(own.values())


def _of_study(study: Study) -> list[SweptOptimum]:
    runs = study.tables.runs
    needed = ("lr", "steps", "batch_size", "data_kind", "final_reward")
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, *needed])))
    rl = bool(is_rl(runs).all())
    runs = runs.assign(loss=1 - runs["final_reward"] if rl else runs["final_test_nll"])
    runs = runs[(runs["placement"].fillna("all") == "all") & ~runs["data_kind"].eq("facts")]
    model = study.of.source.models[study.model]
    optima = []
    for _, group in runs.groupby(["dataset", "batch_size", "steps"], dropna=False):
        first = group.iloc[0]
        about = LrOptimum(
            source=study.of.name,
            model=study.model,
            family=model.family or "",
            dataset=str(first["dataset"]),
            method="",
            rank=None,
            width=float(model.hidden_size or NAN),
            batch_size=_number(first["batch_size"]),
            steps=_number(first["steps"]),
            alpha=_alpha(study.of.source.attributes.alpha),
            rl=rl,
            lr=NAN,
            error=NAN,
            counts=False,
            remark="",
        )
        optima += _of_arms(group, about)
    return optima


def _of_arms(runs: pd.DataFrame, about: LrOptimum) -> list[SweptOptimum]:
    """Return the optimum of FullFT and that of LoRA's highest rank with a grid, from runs of one condition.

    Args:
        runs: the columns method, rank, lr, loss and status.
        about: what the optima share.
    """
    optima = []
    fullft = runs[runs["method"] == "fullft"]
    if fullft["lr"].nunique() >= MIN_LRS:
        optima.append(_of_grid(fullft, replace(about, method="fullft", alpha=ALPHA)))
    lora = runs[runs["method"] == "lora"]
    swept = [int(str(rank)) for rank, arm in lora.groupby("rank") if arm["lr"].nunique() >= MIN_LRS]
    if swept:
        highest = max(swept)
        optima.append(_of_grid(lora[lora["rank"] == highest], replace(about, method="lora", rank=highest)))
    return optima


def _of_grid(arm: pd.DataFrame, about: LrOptimum) -> SweptOptimum:
    cells = arm.assign(lost=~arm["status"].eq("done"), loss=arm["loss"].astype(float)).groupby(arm["lr"].astype(float))
    grid = cells.agg(loss=("loss", "mean"), lost=("lost", "any"))
    logs, losses = np.log(grid.index.to_numpy(float)), grid["loss"].to_numpy(float)
    lost = grid["lost"].to_numpy(bool) | ~np.isfinite(losses)
    best = int(np.where(lost, math.inf, losses).argmin())
    inside = 0 < best < len(logs) - 1
    log_lr, error = float(logs[best]), NAN
    if inside:
        around = slice(best - 1, best + 2)
        error = float(logs[best + 1] - logs[best - 1]) / 2 / math.sqrt(12)
        if not lost[around].any():
            log_lr = float(vertex(logs[around], losses[around]))
    known = np.isfinite(losses)
    remark = f"grid of {len(logs)} LRs" if inside else "the best LR is at the edge of its grid"
    optimum = replace(about, lr=_rounded(math.exp(log_lr)), error=error, counts=inside, remark=remark)
    return SweptOptimum(optimum, tuple(logs[known].tolist()), tuple(losses[known].tolist()))


def _of_authors() -> list[SweptOptimum]:
    """Return the published sweep of the paper's authors, and their law at some widths of its models."""
    optima = []
    table = published_sweeps()
    of_sweep = table[table["source"] == "tinker-cookbook"]
    for model, of_model in of_sweep.groupby("model"):
        first = of_model.iloc[0]
        about = _stated_optimum(
            AUTHORS, str(model), "lora", NAN, width=float(first["hidden_size"]), batch_size=_LAW_BATCH,
            steps=_SWEEP_STEPS, alpha=ALPHA, family=str(first["family"]), dataset=str(first["dataset"]),
        )  # fmt: skip
        rank = int(of_model["rank"].max())
        runs = of_model[of_model["rank"] == rank].rename(columns={"nll": "loss"}).assign(status="done")
        # The source tried 3e-3 with every model, and leaves out the runs that ended above 2 nats.
        if runs["lr"].max() < 3e-3:
            runs = pd.concat([runs, pd.DataFrame([{"lr": 3e-3, "loss": NAN, "status": "diverged"}])])
        optima.append(_of_grid(runs, replace(about, rank=rank)))
    for name, widths in _LAW_WIDTHS.items():
        for width in widths:
            for method in ("fullft", "lora"):
                lr = predict_lr(LAW, name, width, method)
                law = _stated_optimum(
                    AUTHORS, f"{name} {width}", method, lr, width=float(width), batch_size=_LAW_BATCH, alpha=ALPHA,
                    family=name, dataset="law",
                )  # fmt: skip
                optima.append(SweptOptimum(law, (), ()))
    return optima


def _stated(names: set[str]) -> list[SweptOptimum]:
    """Return the optima of published tables that have no grid, of other sources than those named."""
    optima = []
    best = published_sweeps()
    best = best[best["source"] == "michaelbzhu"]
    for method, arm in best[best["placement"].fillna("all") == "all"].groupby("method"):
        highest = arm.sort_values("rank").iloc[-1]
        optimum = _stated_optimum(
            "michaelbzhu", str(highest["model"]), str(method), float(highest["lr"]),
            width=float(highest["hidden_size"]), batch_size=32.0, steps=200.0, alpha=ALPHA,
            family=str(highest["family"]), dataset=str(highest["dataset"]),
            rank=None if pd.isna(highest["rank"]) else int(highest["rank"]),
        )  # fmt: skip
        optima.append(SweptOptimum(optimum, (), ()))
    for row in published_ratios().to_dict("records"):
        source = str(row["source"])
        if any(source.casefold().startswith(name) for name in names):
            continue
        for method in ("fullft", "lora"):
            low, high = float(row[f"{method}_lr_low"]), float(row[f"{method}_lr_high"])
            if not (low > 0 and high > 0):
                continue
            optimum = _stated_optimum(
                source.split(" arXiv")[0], str(row["model"]), method, math.sqrt(low * high),
                family=_family(row["model"]), width=math.sqrt(row["width_low"] * row["width_high"]),
                steps=_number(row["steps"]), alpha=_number(row["alpha"]), rl=row["task"] == "rl",
            )  # fmt: skip
            error = math.hypot(optimum.error, math.log(high / low) / math.sqrt(12))
            optima.append(SweptOptimum(replace(optimum, error=error), (), ()))
    return optima


def _stated_optimum(source: str, model: str, method: str, lr: float, **about: Any) -> LrOptimum:
    unknown = {"family": "", "dataset": "", "rank": None, "width": NAN, "batch_size": NAN, "steps": NAN, "alpha": NAN}
    error = _HALF_DECADE / math.sqrt(12)
    fields: dict[str, Any] = {"rl": False, **unknown, **about}
    if method == "fullft":
        fields["alpha"] = ALPHA
    return LrOptimum(
        source=source, model=model, method=method, lr=_rounded(lr), error=error, counts=True,
        remark="as stated by the source", **fields,
    )  # fmt: skip


def _of_preset(folder: Path) -> list[SweptOptimum]:
    """Return the fitted optima of a preset's published figures: LRs by rank, by model, by condition, and of RL.

    Optima at another alpha than ALPHA are left out, since only this project has them and `ALPHA_EXPONENT` stands for
    them.

    Raises:
        UserError: a figure's table names a model that the preset does not have.
    """
    models = load_preset(folder.name).models
    optima = []
    for row in _published_rows(folder):
        spec = models.get(row["model"])
        if spec is None:
            raise UserError(
                f"{folder}: model {row['model']!r} is none of the preset {folder.name}: {', '.join(models)}"
            )
        optimum = LrOptimum(
            source=PROJECT,
            model=row["model"],
            family=_family_of(spec),
            dataset=row["dataset"],
            method=row["method"],
            rank=row["rank"],
            width=float(dimensions(spec).hidden),
            batch_size=float(row["batch_size"]),
            steps=float(row["steps"]),
            alpha=ALPHA,
            rl=row["rl"],
            lr=_rounded(row["lr"]),
            error=max(LEAST_ERROR, row["error"]),
            counts=True,
            remark="fitted" if row["resolved"] else "fitted, not resolved",
        )
        optima.append(SweptOptimum(optimum, row["log_lrs"], row["losses"]))
    return optima


def _published_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for figure, value, rl in (("fig2_lr_by_rank", "nll", False), ("fig6_rl_lr", "accuracy", True)):
        if not (folder / f"{figure}.csv").is_file():
            continue
        table = pd.read_csv(folder / f"{figure}.csv")
        for _, arms in table.groupby(["model", "dataset", "batch_size", "steps"]):
            optima = arms[(arms["element"] == "optimum") & arms["lr_low"].notna()]
            for method, of_method in optima.groupby("method"):
                row = of_method.sort_values("rank").iloc[-1]
                grid = arms[(arms["element"] == ("accuracy" if rl else "loss")) & (arms["arm"] == row["arm"])]
                grid = grid[np.isfinite(grid[value])].sort_values("lr")
                losses = 1 - grid[value] if rl else grid[value]
                error = math.log(row["lr_high"] / row["lr_low"]) / (2 * Z)
                rows.append(_row(row, str(method), row["lr"], error, rl, np.log(grid["lr"]), losses))
    for figure in ("lr_ratio", "lr_law"):
        if not (folder / f"{figure}.csv").is_file():
            continue
        table = pd.read_csv(folder / f"{figure}.csv")
        if figure == "lr_ratio":
            own = table[(table["element"] == "condition") & (table["runs"] == "own") & (table["alpha"] == ALPHA)]
            for _, row in own.drop_duplicates(["model", "dataset", "batch_size", "steps"]).iterrows():
                # The two optima share the error of their ratio.
                error = math.log(row["ratio_high"] / row["ratio_low"]) / (2 * Z) / math.sqrt(2)
                for method in ("fullft", "lora"):
                    rows.append(_row(row, method, row[f"{method}_lr"], error, False))
        else:
            for _, row in table[table["element"] == "optimum"].iterrows():
                error = math.log(row["lr_high"] / row["lr_low"]) / (2 * Z)
                rows.append(_row(row, str(row["method"]), row["lr"], error, False))
    return rows


def _row(
    row: Any, method: str, lr: float, error: float, rl: bool, log_lrs: Any = (), losses: Any = ()
) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("model", "dataset", "batch_size", "steps")},
        "method": method,
        "rank": None if method == "fullft" or pd.isna(row["rank"]) else int(row["rank"]),
        "lr": float(lr),
        "error": error,
        "rl": rl,
        "resolved": bool(row["resolved"]),
        "log_lrs": tuple(map(float, log_lrs)),
        "losses": tuple(map(float, losses)),
    }


def optima_table(optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Return optima as a table, one row each."""
    names = list(LrOptimum.__dataclass_fields__)
    return pd.DataFrame([asdict(optimum) for optimum in optima], columns=names).astype({"rank": "Int64"})


def read_optima(path: Path) -> list[LrOptimum]:
    """Read the table of optima that `lorabench evidence` writes."""
    return optima_of_table(pd.read_csv(path))


def optima_of_table(table: pd.DataFrame) -> list[LrOptimum]:
    """Return the optima of a table, the inverse of `optima_table`."""
    table = table.copy()
    texts = ["source", "model", "family", "dataset", "method", "remark"]
    table[texts] = table[texts].astype(object).fillna("")
    return [
        LrOptimum(
            **{str(name): row[name] for name in row} | {"rank": None if pd.isna(row["rank"]) else int(row["rank"])}
        )
        for row in table.to_dict("records")
    ]


def _number(value: Any) -> float:
    return NAN if pd.isna(value) else float(value)


def _alpha(text: str) -> float:
    """Return an alpha that is a number; NaN for a rule, or where it is not known."""
    try:
        return float(text)
    except ValueError:
        return NAN


def _family_of(spec: ModelSpec) -> str:
    """Return the family of a preset's model; that of a model which is not shipped is the beginning of its name."""
    if isinstance(spec, TinyModel):
        return str(json.loads((shipped_folder(spec.name) / "config.json").read_text())["model_type"])
    return _family(spec.id.rsplit("/", 1)[-1]) if isinstance(spec, HubModel) else ""


def _family(model: str) -> str:
    return lineage(model.split("-")[0].split()[0])


def _rounded(lr: float) -> float:
    return lr if math.isnan(lr) else float(f"{lr:.4g}")
