"""How far off the recommended learning rates would have been for each source, had it not been known: leave one out.

    python -m benchmarks.lr_left_out

The two tables and the figure are written into paper_figures/published/evidence.

Three rules predict each known optimum: `pooled` from all other sources, `law` from the paper's law, and `law_sqrt` from
the law with the square-root rule for the batch size. Where the optimum has a grid with losses, the loss at the
predicted LR is interpolated in ln LR (monotone cubic), and compared with the lowest loss of the grid. Beyond the grid
it is at least that of its edge.

The law was fitted to the sweeps of its authors, so their source does not count when the rules are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator
from scipy.special import stdtrit

from lorabench.analysis.pooled_lr import PRIORS, REFERENCE, PooledLr
from lorabench.figures import style
from lorabench.report.publish import PUBLISHED, published_folders
from lorabench.sources.lr_optima import AUTHORS, LrOptimum, known_optima, rounded
from lorabench.sources.studies import read_studies, source_folders
from lorabench.store.io import write_csv

RULES = {
    "pooled": "pooled from the other sources",
    "law": "the law",
    "law_sqrt": "the law with the square root of the batch size",
}
"""The rules with their descriptions."""

PROBABILITIES = (0.8, 0.95)
"""The probabilities of the prediction intervals."""

METHODS = ("fullft", "lora")


def left_out(optima: Sequence[LrOptimum]) -> pd.DataFrame:
    """Predict every known optimum from the other sources and by the law, SFT and RL apart.

    Returns:
        One row for each optimum and rule. `factor` is the predicted over the measured LR; null where the optimum is at
        the edge of its grid. The intervals include the error of the measured optimum. `loss_above_best` is in nats per
        token, in RL in accuracy; with `at_least`, the predicted LR is beyond the grid.
    """
    rows: list[dict[str, Any]] = []
    for rl, method in product((False, True), METHODS):
        same = [optimum for optimum in optima if (optimum.rl, optimum.method) == (rl, method)]
        for source in dict.fromkeys(optimum.source for optimum in same):
            others = [optimum.pooled for optimum in same if optimum.counts and optimum.source != source]
            if len({other.source for other in others}) >= 2:
                pooled = PooledLr(others)
                for optimum in same:
                    if optimum.source == source and (optimum.counts or optimum.losses):
                        rows += _rows(optimum, pooled)
    return pd.DataFrame(rows)


def _rows(optimum: LrOptimum, pooled: PooledLr) -> list[dict[str, Any]]:
    """Return the row of each rule for an optimum, given the optima of the other sources."""
    place, shift = optimum.place, optimum.shift
    measured, error = (optimum.pooled.log_lr, optimum.pooled.error) if optimum.counts else (math.nan, 0.0)
    intervals = {p: pooled.predict(place, p, error=error) for p in PROBABILITIES}
    batch = 0.0 if math.isnan(place.batch_size) else math.log(place.batch_size / REFERENCE["batch_size"])
    predicted = {
        "pooled": intervals[PROBABILITIES[0]].mean,
        "law": place.log_law,
        "law_sqrt": place.log_law + PRIORS["batch_size"].mean * batch,
    }
    rows = []
    for rule, log_lr in predicted.items():
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
            logs, losses = np.array(optimum.log_lrs), np.array(optimum.losses)
            within = float(np.clip(log_lr - shift, logs[0], logs[-1]))
            loss = float(PchipInterpolator(logs, losses)(within))
            row |= {"loss_above_best": loss - float(losses.min()), "at_least": within != log_lr - shift}
        rows.append(row)
    return rows


def by_source(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean error of each source and rule, one row each, in the order of `left_out`.

    Returns:
        `off` is the geometric mean of the factors by which the predicted LRs are off, either way; `signed` that of the
        factors themselves.
    """
    logs = rows.assign(log=np.log(rows["factor"]), size=np.log(rows["factor"]).abs())
    means = logs.groupby(["task", "method", "source", "rule"], sort=False).agg(
        optima=("factor", "count"),
        off=("size", "mean"),
        signed=("log", "mean"),
        inside_80=("inside_80", "mean"),
        inside_95=("inside_95", "mean"),
        grids=("loss_above_best", "count"),
        loss_above_best=("loss_above_best", "mean"),
        at_least=("at_least", "any"),
    )
    return means.assign(off=np.exp(means["off"]), signed=np.exp(means["signed"])).reset_index()


def compared(sources: pd.DataFrame) -> pd.DataFrame:
    """Compare the rules over the sources that none of them has seen, each source once.

    Args:
        sources: as from `by_source`.

    Returns:
        One row for each task, method and rule. `off` is the geometric mean over sources, `worst` the largest of one
        source. `against_law` is the ratio of `off` to that of the law with its 95% interval (t over sources), and
        `closer` the number of sources where the rule is closer than the law. `inside_80` and `inside_95` are the shares
        of sources' optima inside of the intervals, a mean over sources.
    """
    sources = sources[sources["source"] != AUTHORS].assign(log=lambda table: np.log(table["off"]))
    law = sources[sources["rule"] == "law"].set_index(["task", "method", "source"])["log"].rename("log_law")
    sources = sources.join(law, on=["task", "method", "source"])
    sources["over_law"] = sources["log"] - sources["log_law"]
    groups = sources.groupby(["task", "method", "rule"], sort=False)
    table = groups.agg(
        sources=("log", "count"),
        off=("log", "mean"),
        worst=("log", "max"),
        against_law=("over_law", "mean"),
        spread=("over_law", "std"),
        closer=("over_law", lambda logs: int((logs < 0).sum())),
        inside_80=("inside_80", "mean"),
        inside_95=("inside_95", "mean"),
        grids=("grids", lambda counts: int((counts > 0).sum())),
        loss_above_best=("loss_above_best", "mean"),
    )
    half = stdtrit(table["sources"] - 1, 0.975) * table.pop("spread") / np.sqrt(table["sources"])
    table.insert(4, "against_law_low", table["against_law"] - half)
    table.insert(5, "against_law_high", table["against_law"] + half)
    logs = ["off", "worst", "against_law", "against_law_low", "against_law_high"]
    return table.assign(**{name: np.exp(table[name]) for name in logs}).reset_index()


_RULES: dict[str, dict[str, Any]] = {
    "pooled": {"color": "#274b8f", "marker": "o", "markersize": 6},
    "law": {"color": "#9a4a00", "marker": "s", "markersize": 5, "markerfacecolor": "white"},
    "law_sqrt": {"color": "#9a4a00", "marker": "x", "markersize": 5},
}
_METHODS = {"fullft": "FullFT", "lora": "LoRA"}


@style.applied()
def draw_left_out(sources: pd.DataFrame) -> Figure:
    """Draw how far off rules are, as `by_source` says: a panel for each task and method, with a row for each source."""
    measured = sources[sources["optima"] > 0]
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
    handles = [style.line(label, linestyle="", **_RULES[rule]) for rule, label in RULES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def main() -> None:
    """Predict the optima of all shipped sources and published presets, and write what came out."""
    optima = known_optima(read_studies(source_folders()), published_folders(Path()))
    rows = left_out(optima)
    sources = by_source(rows)
    out = Path() / PUBLISHED / "evidence"
    write_csv(rows, out / "lr_left_out.csv")
    write_csv(compared(sources), out / "lr_left_out_summary.csv")
    for kind in ("svg", "png"):
        style.write_figure(draw_left_out(sources), out / f"lr_left_out.{kind}")


if __name__ == "__main__":
    main()
