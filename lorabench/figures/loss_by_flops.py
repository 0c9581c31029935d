"""Learning curves over training FLOPs; the paper predicts what they show, but has no such figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.arms import arm_label
from lorabench.analysis.noise import seed_noise, sigma_of
from lorabench.analysis.step_flops import loss_by_flops
from lorabench.errors import NothingToDrawError
from lorabench.figures import style
from lorabench.store.tables import Tables

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement"),
    *("element", "flops", "step", "tokens", "nll", "lr", "run_id"),
]


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `envelope` (one step of an arm) or `diverged` (one run). Losses are
    validation NLL in nats per scored token.

    Raises:
        NothingToDrawError: runs lack train_flops or train_tokens, or none with both has a validation curve.
    """
    missing = [name for name in ("train_flops", "train_tokens") if name not in tables.runs]
    if missing:
        raise NothingToDrawError(f"the runs table has no column {', '.join(missing)}")
    plotted = _plotted(tables.runs, tables.curves)
    if plotted.empty:
        raise NothingToDrawError("no validation curves of runs whose training FLOPs are known")
    noise = seed_noise(tables.runs)
    figure, panels = style.panels(plotted)
    styles = style.arm_styles(plotted)
    for rows, axes in panels:
        _draw_panel(axes, rows, styles, sigma_of(noise, rows.iloc[0], "validation"))
    style.legends(figure, styles, [])
    return figure, plotted


def _plotted(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    envelope = loss_by_flops(runs, curves).rename(columns={"value": "nll"})
    parts = {"envelope": envelope, "diverged": runs[runs["status"] == "diverged"]}
    labelled = [
        part.assign(element=element, arm=[arm_label(row) for _, row in part.iterrows()])
        for element, part in parts.items()
        if len(part)
    ]
    return pd.concat([pd.DataFrame(columns=_COLUMNS), *labelled])[_COLUMNS].reset_index(drop=True)


def _draw_panel(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle], sigma: float) -> None:
    envelope, diverged = (rows[rows["element"] == element] for element in ("envelope", "diverged"))
    for arm, points in envelope.groupby("arm"):
        axes.plot(points["flops"].astype(float), points["nll"].astype(float), **styles[str(arm)].line)
    axes.set(xscale="log", xlabel="training FLOPs (linear layers)", ylabel="validation NLL (nats / token)")
    facts = [style.sigma_text(sigma), *style.diverged_text(diverged)]
    lost = sorted(set(diverged["arm"]) - set(envelope["arm"]))
    facts += [f"no curve: {', '.join(lost)}"] if lost else []
    style.note(axes, " · ".join(facts))
