"""Optimal learning rates of LoRA and full fine-tuning against hidden size, the law fitted to them, and their ratio."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorabench.analysis.arms import arm_label, is_standard, with_arm_columns
from lorabench.analysis.comparison import Arm, Judging, comparisons
from lorabench.analysis.example_losses import ExampleLosses
from lorabench.analysis.lr_law import PUBLISHED, LrLaw, SweptModel, fitted_law, lineage, predict_lr, swept_models
from lorabench.analysis.optima import lr_optima, ratio_interval
from lorabench.analysis.published import paper_numbers, published_sweeps
from lorabench.figures import style
from lorabench.figures.short_run import ratio_axis
from lorabench.store.tables import Tables

_COLUMNS = [
    *("model", "dataset", "batch_size", "steps", "arm", "method", "rank", "placement", "family", "hidden_size"),
    *("element", "lr", "lr_low", "lr_high", "nll", "ratio", "ratio_low", "ratio_high", "resolved", "run_id", "source"),
]
_DATA = ["dataset", "batch_size", "steps"]

_MARKERS, _LINES = {"llama": "o", "qwen": "s"}, {"llama": "-", "qwen": "--"}
_OTHER_MARKER, _OTHER_LINE, _GREY = "^", ":", "0.65"


@style.applied()
def draw(tables: Tables) -> tuple[Figure, pd.DataFrame]:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `optimum` (fitted optimal LR of an arm with its 95% interval; `nll` is the
    fitted lowest test loss in nats per scored token), `ratio` (of the optimal LR of LoRA to that of FullFT), `law` (a
    point of the law fitted here), `published_law` (a point of the law of the authors' code), `published` (an optimum
    that `source` published), `naive` (the ratio hidden/64), `reference` (the paper's ratio of 10) or `diverged` (one
    run). `family` is the family by which the law has its exponents.
    """
    runs = with_arm_columns(tables.runs[is_standard(tables.runs)])
    runs = runs.reindex(columns=list(dict.fromkeys([*runs.columns, "family", "hidden_size"])))
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    groups = swept_models(comparisons(runs, tables.curves, judging))
    laws = [fitted_law(models) for models in groups]
    parts = [_rows(models, law) for models, law in zip(groups, laws, strict=True)]
    plotted = pd.concat([*parts, _diverged(runs)], ignore_index=True).reindex(columns=_COLUMNS)
    figure = style.new_figure(style.PANEL_HEIGHT * max(1, len(groups)))
    if not groups:
        axes = figure.add_subplot()
        axes.set_axis_off()
        style.note(axes, "no model of known family and hidden size with both FullFT and LoRA above rank 1")
        return figure, plotted
    of_arms = plotted[plotted["element"] == "optimum"]
    styles = style.arm_styles(of_arms)
    drawn = {model.name for models in groups for model in models}
    left_out = sorted(set(runs["model"]) - drawn)
    for row, (models, law, rows) in enumerate(zip(groups, laws, parts, strict=True)):
        lr_axes, ratio_axes = (figure.add_subplot(len(groups), 2, 2 * row + column) for column in (1, 2))
        first = models[0].fullft
        title = f"{first['dataset']} · batch {first['batch_size']}"
        title += f" · {first['steps']} steps" if first["steps"] is not None else ""
        lr_axes.set_title(title, pad=18, parse_math=False)
        _draw_lrs(lr_axes, rows, styles)
        _draw_ratios(ratio_axes, rows, styles)
        facts = [_law_text(law)] + ([f"not drawn: {', '.join(left_out)}"] if left_out else [])
        style.note(lr_axes, " · ".join(facts))
        n_diverged = len(_diverged(pd.concat([model.comparison.runs for model in models])))
        style.note(ratio_axes, f"{len(models)} models · {n_diverged} diverged")
    style.legends(figure, styles, _marks(plotted))
    return figure, plotted


def _rows(models: list[SweptModel], law: LrLaw | None) -> pd.DataFrame:
    """Return what is plotted of models that were trained on the same data."""
    rows: list[dict[str, Any]] = []
    for model in models:
        of_model = {"family": model.lineage, "hidden_size": model.hidden_size}
        for arm in (model.fullft, model.lora):
            rows.append(arm | of_model | _optimum(model, arm) | {"element": "optimum", "arm": arm_label(arm)})
        low, high = ratio_interval(model.log_ratio)
        ratio = {"ratio": math.exp(model.log_ratio.value), "ratio_low": low, "ratio_high": high}
        resolved = not model.problems
        rows.append(
            model.lora | of_model | ratio | {"element": "ratio", "resolved": resolved, "arm": arm_label(model.lora)}
        )
    families = sorted({model.lineage for model in models})
    published = _published_optima(families)
    sizes = [model.hidden_size for model in models] + published["hidden_size"].astype(int).tolist()
    span = np.geomspace(min(sizes) / 1.25, max(sizes) * 1.25, 2)
    curves = {"published_law": PUBLISHED} | ({} if law is None else {"law": law})
    for element, curve in curves.items():
        for family in sorted(set(families) & set(curve.exponents)):
            for arm in (models[0].fullft, models[0].lora):
                for size in span:
                    lr = predict_lr(curve, family, size, arm["method"])
                    point = {"element": element, "family": family, "hidden_size": size, "lr": lr}
                    rows.append(point | {"arm": arm_label(arm), "method": arm["method"]})
    rows += [{"element": "naive", "hidden_size": size, "ratio": size / 64} for size in span]
    ten = paper_numbers().get("lr_ratio_lora_over_fullft")
    rows += [{"element": "reference", "hidden_size": size, "ratio": ten} for size in span if ten is not None]
    frame = pd.concat([part for part in (pd.DataFrame(rows), published) if len(part)], ignore_index=True)
    return frame.assign(**{name: models[0].fullft[name] for name in _DATA})


def _optimum(model: SweptModel, arm: Arm) -> dict[str, Any]:
    """Return the fitted optimum of an arm; without a fit, the LR of its grid with the lowest loss, if any."""
    fit, label = model.comparison.fit, arm_label(arm)
    if label not in fit.optima:
        lr = fit.grids[label].lrs[fit.grids[label].centre] if label in fit.grids else math.nan
        return {"lr": lr, "lr_low": math.nan, "lr_high": math.nan, "nll": math.nan, "resolved": False}
    low, high = fit.optima[label].interval()
    return {
        "lr": math.exp(fit.optima[label].value),
        "lr_low": math.exp(low),
        "lr_high": math.exp(high),
        "nll": fit.minima[label].value,
        "resolved": fit.resolved[label],
    }


def _published_optima(families: list[str]) -> pd.DataFrame:
    """Return the published optimal LRs of FullFT, and of LoRA at each model's highest rank on all layers."""
    table = published_sweeps()
    table = table[table["family"].isin(families) & ((table["placement"] == "all") | (table["method"] == "fullft"))]
    highest = table.groupby("model")["rank"].transform("max")
    table = table[table["rank"].isna() | (table["rank"] == highest)]
    runs = table.assign(
        run_id=[str(row) for row in table.index],
        batch_size=0,
        seed=0,
        status="done",
        final_valid_nll=table["nll"],
        final_test_nll=table["nll"],
    )
    optima = lr_optima(runs)
    about = table.drop_duplicates("model").set_index("model")
    # A best LR that was published without its grid counts as resolved, as its source says it is best.
    on_grid = optima["n_runs"] > 1
    return pd.DataFrame(
        {
            "element": "published",
            "model": optima["model"],
            "method": optima["method"],
            "rank": optima["rank"],
            "placement": optima["placement"],
            "arm": [arm_label(row) for _, row in optima.iterrows()],
            "family": optima["model"].map(about["family"]).map(lineage),
            "hidden_size": optima["model"].map(about["hidden_size"]),
            "source": optima["model"].map(about["source"]),
            "lr": optima["lr_opt"].fillna(optima["lr_best"]),
            "resolved": ~(on_grid & optima["edge"].astype(bool)),
        }
    )


def _diverged(runs: pd.DataFrame) -> pd.DataFrame:
    diverged = runs[runs["status"] == "diverged"]
    labels = [arm_label(row) for _, row in diverged.iterrows()]
    return diverged.assign(element="diverged", arm=labels).reindex(columns=_COLUMNS)


def _draw_lrs(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    for element in ("published_law", "law"):
        for (family, arm), points in rows[rows["element"] == element].groupby(["family", "arm"]):
            ours = element == "law"
            colour, width = (styles[str(arm)].colour, 1.3) if ours else (_GREY, 0.8)
            line: dict[str, Any] = {"color": colour, "lw": width, "ls": _LINES.get(str(family), _OTHER_LINE)}
            axes.plot(points["hidden_size"].astype(float), points["lr"], zorder=2 if ours else 1, **line)
    for row in rows[rows["element"] == "published"].to_dict("records"):
        face = _GREY if row["resolved"] else "white"
        axes.plot(row["hidden_size"], row["lr"], _marker(row), ms=4, mfc=face, mec=_GREY, zorder=1.5)
    _points(axes, rows[rows["element"] == "optimum"], "lr", styles)
    axes.set(xscale="log", yscale="log", xlabel="hidden size", ylabel="optimal learning rate")
    style.plain_log_ticks(axes)


def _draw_ratios(axes: Axes, rows: pd.DataFrame, styles: dict[str, style.ArmStyle]) -> None:
    for element, line, words in (("reference", "-", "paper: {:g}"), ("naive", "--", "naive: hidden / 64")):
        points = rows[rows["element"] == element]
        axes.plot(points["hidden_size"].astype(float), points["ratio"], line, color=_GREY, linewidth=0.9, zorder=1)
        if len(points):
            end = points.iloc[-1]
            at = (float(end["hidden_size"]), float(end["ratio"]))
            axes.annotate(
                words.format(end["ratio"]),
                at,
                (-2, 3),
                textcoords="offset points",
                color=style.MUTED,
                fontsize=7.5,
                ha="right",
            )
    _points(axes, rows[rows["element"] == "ratio"], "ratio", styles)
    axes.set(xscale="log", xlabel="hidden size")
    style.plain_log_ticks(axes)
    ratio_axis(axes)


def _points(axes: Axes, rows: pd.DataFrame, value: str, styles: dict[str, style.ArmStyle]) -> None:
    """Draw values with their interval, by family and arm; a mark is open where the value is not resolved."""
    for row in rows.dropna(subset=[value]).to_dict("records"):
        colour = styles[row["arm"]].colour
        axes.vlines(row["hidden_size"], row[f"{value}_low"], row[f"{value}_high"], color=colour, lw=1.2, zorder=4)
        face = colour if row["resolved"] else "white"
        axes.plot(row["hidden_size"], row[value], _marker(row), ms=5.5, mfc=face, mec=colour, mew=1.2, zorder=5)


def _marker(row: dict[Any, Any]) -> str:
    return _MARKERS.get(row["family"], _OTHER_MARKER)


def _law_text(law: LrLaw | None) -> str:
    if law is None:
        return "too few models to fit the law"
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in law.exponents.items())
    return f"fit: base {law.base:.2g}, M {law.multiplier:.3g}, exponent {exponents}"


def _marks(plotted: pd.DataFrame) -> list[Artist]:
    """Return the legend entries of the marks that occur."""
    elements = set(plotted["element"])
    optimum = plotted[plotted["element"].isin(["optimum", "ratio"])]
    entries: list[Artist] = [
        style.mark(f"{family}, fitted law", _MARKERS.get(family, _OTHER_MARKER), ls=_LINES.get(family, _OTHER_LINE))
        for family in sorted(optimum["family"].unique())
    ]
    if not optimum["resolved"].astype(bool).all():
        entries.append(style.mark("not resolved", "o", markerfacecolor="white", markeredgewidth=1.2))
    if "published" in elements:
        entries.append(style.mark("published optima", "o", color=_GREY, markersize=4))
    if "published_law" in elements:
        entries.append(style.mark("published law", "", color=_GREY, linestyle="-"))
    return entries
