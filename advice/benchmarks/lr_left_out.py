"""How far off the recommended learning rates would have been for each source, had it not been known: leave one out.

    python -m advice.benchmarks.lr_left_out

The two tables and the figure are written into paper_figures/published/evidence.

Three rules predict each known optimum: `pooled` from all other sources, `law` from the paper's law, and `law_sqrt` from
the law with the square-root rule for the batch size. LoRA's optima are also predicted from those of full fine-tuning:
by the theory `movement` (studies/lr_ratio), from the pooled optimum of the other sources or from the source's own one
in the same condition, as if a user had swept full fine-tuning alone, and by ten times the latter. Where the optimum has
a grid with losses, the loss at the predicted LR is interpolated in ln LR (monotone cubic), and compared with the lowest
loss of the grid. Beyond the grid it is at least that of its edge.

The law was fitted to the sweeps of its authors, so their source does not count when the rules are compared. The
constants of `movement` were fitted to runs of this project, so for LoRA they are compared without this project too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lora_advice import theory
from lora_advice.optima import LrOptimum as PooledOptimum
from lora_advice.pooled_lr import PRIORS, REFERENCE, Place, PooledLr
from lora_advice.theory import ALPHA, PIVOT
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator
from scipy.special import stdtrit

from lorabench.figures import style
from lorabench.sources.lr_optima import AUTHORS, LrOptimum, known_optima, rounded
from lorabench.sources.measurements import PROJECT
from lorabench.sources.source import read_sources, source_folders
from lorabench.store.io import write_csv
from lorabench.store.published import PUBLISHED, evidence_folders

RULES = {
    "pooled": "pooled from the other sources",
    "law": "the law",
    "law_sqrt": "the law with the square root of the batch size",
    "movement": "movement from FullFT's pooled LR",
    "movement_own": "movement from the source's own LR of FullFT",
    "ten_own": "ten times the source's own LR of FullFT",
    "average": "the geometric mean of pooled and movement_own",
}
"""The rules with their descriptions; those after the first three predict LoRA's optima from FullFT's."""

_FROM_FULLFT = list(RULES)[3:]

PROBABILITIES = (0.8, 0.95)
"""The probabilities of the prediction intervals."""

METHODS = ("fullft", "lora")


def left_out(optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Predict every known optimum from the other sources and by the law, SFT and RL apart.

    Returns:
        One row for each optimum and rule. `factor` is the predicted over the measured LR; null where the optimum is at
        the edge of its grid. The intervals include the error of the measured optimum; those of a rule that predicts
        from FullFT's LR follow from its errors on the other sources. `loss_above_best` is in nats per token, in RL in
        accuracy; with `at_least`, the predicted LR is beyond the grid.
    """
    rows: list[dict[str, Any]] = []
    own = {(optimum.rl, *condition_of(optimum)): optimum for optimum in optima if optimum.method == "fullft"}
    fullft: dict[tuple[bool, str], PooledLr] = {}
    for rl, method in product((False, True), METHODS):
        same = [optimum for optimum in optima if (optimum.rl, optimum.method) == (rl, method)]
        for source in dict.fromkeys(optimum.source for optimum in same):
            others = [pooled_optimum(optimum).pooled for optimum in same if optimum.counts and optimum.source != source]
            if len({other.source for other in others}) >= 2:
                pooled = PooledLr(others)
                if method == "fullft":
                    fullft[rl, source] = pooled
                for optimum in same:
                    if optimum.source == source and (optimum.counts or optimum.losses):
                        known = own.get((rl, *condition_of(optimum))), fullft.get((rl, source))
                        rows += _rows(optimum, pooled, *known)
    return _with_intervals(pd.DataFrame(rows))


def pooled_optimum(optimum: LrOptimum) -> PooledOptimum:
    """Return an optimum as it is pooled."""
    names = {field.name for field in fields(PooledOptimum)}
    known = {name: value for name, value in vars(optimum).items() if name in names and value is not None}
    return PooledOptimum(**known)


def condition_of(optimum: LrOptimum) -> tuple[str, ...]:
    """Return what the optima of LoRA and of full fine-tuning in one condition share, as text."""
    return tuple(str(getattr(optimum, name)) for name in ("source", "model", "dataset", "batch_size", "steps"))


def movement_ratio(optimum: LrOptimum, log_fullft: float) -> float:
    """Return the ratio that `movement` predicts where LoRA has an optimum, at its own alpha, from ln LR of FullFT.

    What the source does not say is at its reference.
    """
    known = zip((optimum.width, optimum.steps, optimum.alpha), (PIVOT, REFERENCE["steps"], ALPHA), strict=True)
    width, steps, alpha = (other if math.isnan(value) else value for value, other in known)
    setting = theory.LoraSetting(width, steps, alpha, optimum.rank or theory.LoraSetting.rank, optimum.mean_lr)
    return theory.movement_ratio(setting, math.exp(log_fullft))


def _from_fullft(optimum: LrOptimum, own: LrOptimum | None, fullft: PooledLr | None, pooled: float) -> dict[str, float]:
    """Return by rule LoRA's predicted ln LR at ALPHA from that of full fine-tuning, as far as the latter is known."""

    def movement(log_fullft: float) -> float:
        return log_fullft + math.log(movement_ratio(optimum, log_fullft)) + pooled_optimum(optimum).shift

    said = {}
    if fullft:
        place = Place.at(optimum.family, optimum.width, "fullft", optimum.batch_size, optimum.steps)
        said["movement"] = movement(fullft.predict(place).mean)
    if own and own.counts:
        said["movement_own"] = movement(math.log(own.lr))
        said["ten_own"] = math.log(own.lr) + math.log(10)
        said["average"] = (said["movement_own"] + pooled) / 2
    return said


def _rows(optimum: LrOptimum, pooled: PooledLr, own: LrOptimum | None, fullft: PooledLr | None) -> list[dict[str, Any]]:
    """Return the row of each rule for an optimum, by the optima of the other sources.

    `pooled` are those by the same method, `fullft` those of full fine-tuning, and `own` is the optimum of full
    fine-tuning in the same condition.
    """
    stated = pooled_optimum(optimum)
    place, shift = stated.pooled.place, stated.shift
    measured, error = (stated.pooled.log_lr, stated.pooled.error) if optimum.counts else (math.nan, 0.0)
    intervals = {p: pooled.predict(place, p, error=error) for p in PROBABILITIES}
    batch = 0.0 if math.isnan(place.batch_size) else math.log(place.batch_size / REFERENCE["batch_size"])
    said = {
        "pooled": intervals[PROBABILITIES[0]].mean,
        "law": place.log_law,
        "law_sqrt": place.log_law + PRIORS["batch_size"].mean * batch,
    }
    if optimum.method == "lora":
        said |= _from_fullft(optimum, own, fullft, said["pooled"])
    rows = []
    for rule, log_lr in said.items():
        row: dict[str, Any] = {
            "task": "rl" if optimum.rl else "sft",
            "method": optimum.method,
            **{name: getattr(optimum, name) for name in ("source", "model", "dataset", "batch_size", "steps")},
            "lr": optimum.lr if optimum.counts else math.nan,
            "rule": rule,
            "predicted": rounded(math.exp(log_lr - shift)),
            "factor": math.exp(log_lr - measured),
        }
        for probability, interval in intervals.items():
            name, numbers = f"{100 * probability:.0f}", [math.nan] * 3
            if rule == "pooled":
                inside = float(interval.low <= measured <= interval.high) if optimum.counts else math.nan
                numbers = [*(rounded(math.exp(end - shift)) for end in (interval.low, interval.high)), inside]
            row |= dict(zip((f"low_{name}", f"high_{name}", f"inside_{name}"), numbers, strict=True))
        row |= {"loss_above_best": math.nan, "at_least": False}
        if len(optimum.losses) > 1:
            row["loss_above_best"], row["at_least"] = loss_above_best(optimum, log_lr - shift)
        rows.append(row)
    return rows


def loss_above_best(optimum: LrOptimum, log_lr: float) -> tuple[float, bool]:
    """Return the loss at ln LR above the lowest one of the optimum's grid, and whether the LR is beyond the grid."""
    logs, losses = np.array(optimum.log_lrs), np.array(optimum.losses)
    within = float(np.clip(log_lr, logs[0], logs[-1]))
    # A rounded LR of the grid's end is not beyond it.
    return float(PchipInterpolator(logs, losses)(within)) - float(losses.min()), abs(within - log_lr) > 1e-3


def _with_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the intervals of rules that predict from full fine-tuning's LR, of which no theory states the error.

    They are those of a normal error without bias whose variance is the mean square of the rule's errors on the other
    sources, each source counted once (t with as many degrees of freedom as there are such sources).
    """
    rows = rows.copy()
    for _, ruled in rows[rows["rule"].isin(_FROM_FULLFT)].groupby(["task", "rule"]):
        logs = np.log(ruled["factor"])
        squares = (logs**2).groupby(ruled["source"]).mean().dropna()
        for source, index in ruled.groupby("source").groups.items():
            others = squares.drop(source, errors="ignore")
            if len(others) < 2:
                continue
            for probability in PROBABILITIES:
                name, half = f"{100 * probability:.0f}", stdtrit(len(others), (1 + probability) / 2)
                half *= math.sqrt(others.mean())
                for end, sign in (("low", -1), ("high", 1)):
                    lrs = rows.loc[index, "predicted"] * math.exp(sign * half)
                    rows.loc[index, f"{end}_{name}"] = lrs.map(rounded)
                inside = (logs[index].abs() <= half).astype(float)
                rows.loc[index, f"inside_{name}"] = inside.where(logs[index].notna())
    return rows


def by_source(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean error of each source and rule, one row each, in the order of `left_out`.

    Returns:
        `off` is the geometric mean of the factors by which the predicted LRs are off, either way; `signed` that of the
        factors themselves; `rms` the root mean square of their logarithms, as a factor.
    """
    logs = rows.assign(log=np.log(rows["factor"]), size=np.log(rows["factor"]).abs())
    logs["square"] = logs["log"] ** 2
    means = logs.groupby(["task", "method", "source", "rule"], sort=False).agg(
        optima=("factor", "count"),
        off=("size", "mean"),
        signed=("log", "mean"),
        rms=("square", "mean"),
        inside_80=("inside_80", "mean"),
        inside_95=("inside_95", "mean"),
        grids=("loss_above_best", "count"),
        loss_above_best=("loss_above_best", "mean"),
        at_least=("at_least", "any"),
    )
    factors = {name: np.exp(means[name]) for name in ("off", "signed")}
    return means.assign(**factors, rms=np.exp(np.sqrt(means["rms"]))).reset_index()


def compared(sources: pd.DataFrame) -> pd.DataFrame:
    """Compare the rules over the sources that none of them has seen, each source once.

    Args:
        sources: as from `by_source`.

    Returns:
        One row for each task, method and rule, over all sources but those in `without`. `off` is the geometric mean
        over sources, `rms` the root mean square of the logarithms as a factor, `worst` the largest of one source.
        `against_law` is the ratio of `off` to that of the law with its 95% interval (t over sources), and `closer` the
        number of sources where the rule is closer than the law; `against_pooled` and `closer_than_pooled` likewise.
        `inside_80` and `inside_95` are the shares of sources' optima inside of the intervals, a mean over sources.
    """
    lora = sources[sources["method"] == "lora"]
    tables = [_compared(sources, (AUTHORS,)), *([_compared(lora, (AUTHORS, PROJECT))] if len(lora) else [])]
    return pd.concat(tables, ignore_index=True)


def _compared(sources: pd.DataFrame, without: Sequence[str]) -> pd.DataFrame:
    sources = sources[~sources["source"].isin(without)].assign(
        log=lambda table: np.log(table["off"]), square=lambda table: np.log(table["rms"]) ** 2
    )
    for other in ("law", "pooled"):
        theirs = sources[sources["rule"] == other].set_index(["task", "method", "source"])["log"].rename("other")
        sources[f"over_{other}"] = sources["log"] - sources.join(theirs, on=["task", "method", "source"])["other"]
    groups = sources.groupby(["task", "method", "rule"], sort=False)

    def against(other: str) -> pd.DataFrame:
        over = groups[f"over_{other}"]
        mean, count = over.mean(), over.count()
        half = stdtrit(count - 1, 0.975) * over.std() / np.sqrt(count)
        ratios = {"": mean, "_low": mean - half, "_high": mean + half}
        return pd.DataFrame({f"against_{other}{end}": np.exp(logs) for end, logs in ratios.items()})

    closer = {other: groups[f"over_{other}"].agg(lambda logs: int((logs < 0).sum())) for other in ("law", "pooled")}
    table = groups.agg(sources=("log", "count"), off=("log", "mean"), rms=("square", "mean"), worst=("log", "max"))
    table = table.assign(off=np.exp(table["off"]), rms=np.exp(np.sqrt(table["rms"])), worst=np.exp(table["worst"]))
    table = table.join(against("law")).assign(closer=closer["law"])
    table = table.join(against("pooled")).assign(closer_than_pooled=closer["pooled"])
    shares = groups.agg(
        inside_80=("inside_80", "mean"),
        inside_95=("inside_95", "mean"),
        grids=("grids", lambda counts: int((counts > 0).sum())),
        loss_above_best=("loss_above_best", "mean"),
    )
    table = table.join(shares).reset_index()
    table.insert(2, "without", " and ".join(without))
    return table


_RULES: dict[str, dict[str, Any]] = {
    "pooled": {"color": "#274b8f", "marker": "o", "markersize": 6},
    "law": {"color": "#9a4a00", "marker": "s", "markersize": 5, "markerfacecolor": "white"},
    "law_sqrt": {"color": "#9a4a00", "marker": "x", "markersize": 5},
    "movement": {"color": "#2e7d32", "marker": "D", "markersize": 4, "markerfacecolor": "white"},
    "movement_own": {"color": "#2e7d32", "marker": "D", "markersize": 4},
}
_METHODS = {"fullft": "FullFT", "lora": "LoRA"}


@style.applied()
def draw_left_out(sources: pd.DataFrame) -> Figure:
    """Draw how far off rules are, as `by_source` says: a panel for each task and method, with a row for each source."""
    measured = sources[(sources["optima"] > 0) & sources["rule"].isin(list(_RULES))]
    names = {task: list(rows["source"].unique()) for task, rows in measured.groupby("task", sort=False)}
    names = {task: names[task] for task in ("sft", "rl") if task in names}
    slots = [len(listed) for listed in names.values()]
    figure = Figure(figsize=(style.WIDTH, 0.24 * sum(slots) + 0.9 * len(slots) + 0.4), layout="constrained")
    panels = figure.subplots(len(slots), 2, sharex=True, squeeze=False, height_ratios=slots)
    for (left, right), (task, listed) in zip(panels, names.items(), strict=True):
        for axes, method in zip((left, right), METHODS, strict=True):
            axes.axvline(1, color="0.5", linestyle="--", linewidth=1, zorder=1)
            for row in measured[(measured["task"] == task) & (measured["method"] == method)].to_dict("records"):
                slot = listed.index(row["source"])
                axes.plot(row["signed"], slot, linestyle="", **_RULES[str(row["rule"])])
            axes.set_xscale("log")
            style.log_ticks(axes.xaxis)
            axes.set_yticks(range(len(listed)), listed)
            axes.set_ylim(len(listed) - 0.5, -0.5)
            axes.set_title(f"{str(task).upper()}, {_METHODS[method]}")
        right.set_yticklabels([])
    for axes in panels[-1]:
        axes.set_xlabel("predicted over measured optimal LR")
    handles = [style.line(RULES[rule], linestyle="", **marks) for rule, marks in _RULES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Predict the optima of all shipped sources and published presets, and write what came out."""
    optima = known_optima(read_sources(source_folders()), evidence_folders(Path()))
    rows = left_out(optima)
    sources = by_source(rows)
    out = Path() / PUBLISHED / "evidence"
    write_csv(rows, out / "lr_left_out.csv")
    write_csv(compared(sources), out / "lr_left_out_summary.csv")
    for kind in ("svg", "png"):
        style.write_figure(draw_left_out(sources), out / f"lr_left_out.{kind}")


if __name__ == "__main__":
    main()
