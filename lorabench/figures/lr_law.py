"""Optimal learning rates of LoRA and full fine-tuning against hidden size, the law fitted to them, and their ratio."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist

from lorabench.analysis.alpha_rules import judged_arms
from lorabench.analysis.arms import arm_label
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.lr_law import (
    METHODS,
    PUBLISHED,
    LrLaw,
    SweptModel,
    fit_lr_law,
    lineage,
    predict_lr,
    swept_models,
)
from lorabench.analysis.published import paper_numbers, published_sweeps
from lorabench.figures import grid, style
from lorabench.figures.grid import ARM_COLUMNS, diverged_runs, only, tidy
from lorabench.store.tables import Tables

_COLUMNS = [*ARM_COLUMNS, "family", "hidden_size", "element", "lr", "lr_low", "lr_high", "nll"]
_COLUMNS += ["ratio", "ratio_low", "ratio_high", "resolved", "run_id", "source"]

_MARKERS, _LINES = {"llama": "o", "qwen": "s"}, {"llama": "-", "qwen": "--"}
_OTHER_MARKER, _OTHER_LINE, _GREY = "^", ":", "0.65"


def draw(tables: Tables) -> style.Drawn:
    """Draw the figure; return it, and what it plots as one tidy table.

    The column `element` says what a row is: `optimum` (fitted optimal LR of an arm with its 95% interval; `nll` is the
    fitted lowest test loss in nats per scored token), `ratio` (of the optimal LR of LoRA to that of FullFT), `law` (a
    point of the law fitted here), `published_law` (a point of the law of the authors' code), `published` (an optimum
    that `source` published), `naive` (the ratio hidden/64), `reference` (the paper's ratio of 10) or `diverged` (one
    run). `family` is the family by which the law has its exponents.
    """
    runs = tables.runs[judged_arms(tables.runs)]
    groups = swept_models(grid.compared(tables, runs))
    laws = [
        fit_lr_law([best for model in models for method in METHODS if (best := model.arm_optimum(method))])
        for models in groups
    ]
    parts = [_rows(models, law) for models, law in zip(groups, laws, strict=True)]
    diverged = tidy({"diverged": diverged_runs(runs).drop(columns=["family", "hidden_size"])}, _COLUMNS)
    plotted = pd.concat([*parts, diverged], ignore_index=True)
    if not groups:
        sentence = "There is no model of known family and hidden size\nwith both FullFT and LoRA above rank 1."
        return style.empty_figure(sentence), plotted
    figure = style.new_figure(style.PANEL_HEIGHT * len(groups))
    styles = style.arm_styles(only(plotted, "optimum"))
    small: dict[str, Any] = {"textcoords": "offset points", "color": style.MUTED, "fontsize": 7.5, "ha": "right"}
    left_out = grid.lacking("not drawn", runs["model"], {model.name for models in groups for model in models})
    for place, (models, law, rows) in enumerate(zip(groups, laws, parts, strict=True)):
        lr_axes, ratio_axes = (figure.add_subplot(len(groups), 2, 2 * place + column) for column in (1, 2))
        first = models[0].fullft
        length = "" if first["steps"] is None else f" · {first['steps']} steps"
        lr_axes.set_title(f"{first['dataset']} · batch {first['batch_size']}{length}", pad=18, parse_math=False)
        rows = rows.assign(marker=rows["family"].map(_MARKERS).fillna(_OTHER_MARKER), filled=rows["resolved"])
        for element, width, zorder in (("published_law", 0.8, 1), ("law", 1.3, 2)):
            for (family, arm), line in only(rows, element).groupby(["family", "arm"]):
                colour = styles[str(arm)].colour if element == "law" else _GREY
                look: dict[str, Any] = {"color": colour, "lw": width, "ls": _LINES.get(str(family), _OTHER_LINE)}
                lr_axes.plot(line["hidden_size"].astype(float), line["lr"], zorder=zorder, **look)
        for row in only(rows, "published").to_dict("records"):
            face = _GREY if row["resolved"] else "white"
            lr_axes.plot(row["hidden_size"], row["lr"], row["marker"], ms=4, mfc=face, mec=_GREY, zorder=1.5)
        grid.points(lr_axes, only(rows, "optimum"), "hidden_size", "lr", styles)
        style.log_axes(lr_axes, "hidden size", "optimal learning rate", "log")
        for element, dashes, text in (("reference", "-", "paper: {:g}"), ("naive", "--", "naive: hidden / 64")):
            line = only(rows, element)
            ratio_axes.plot(line["hidden_size"].astype(float), line["ratio"], dashes, color=_GREY, lw=0.9, zorder=1)
            end = line.iloc[-1]
            ratio_axes.annotate(text.format(end["ratio"]), (end["hidden_size"], end["ratio"]), (-2, 3), **small)
        grid.points(ratio_axes, only(rows, "ratio"), "hidden_size", "ratio", styles)
        style.ratio_axes(ratio_axes, "hidden size")
        fitted = "too few models to fit the law"
        if law:
            exponents = ", ".join(f"{name} {value:.2f}" for name, value in law.exponents.items())
            fitted = f"fit: base {law.base:.2g}, M {law.multiplier:.3g}, exponent {exponents}"
        style.note(lr_axes, fitted, left_out)
        n_diverged = len(diverged_runs(pd.concat([model.comparison.runs for model in models])))
        style.note(ratio_axes, f"{len(models)} models", f"{n_diverged} diverged")
    measured = plotted[plotted["element"].isin(["optimum", "ratio"])]
    entries: list[tuple[Any, Artist]] = [
        (True, style.mark(f"{name}, fitted law", _MARKERS.get(name, _OTHER_MARKER), ls=_LINES.get(name, _OTHER_LINE)))
        for name in sorted(measured["family"].unique())
    ]
    entries += [
        (not measured["resolved"].astype(bool).all(), style.mark("not resolved", "o", mfc="white", mew=1.2)),
        ("published", style.mark("published optima", "o", color=_GREY, ms=4)),
        ("published_law", style.mark("published law", "", color=_GREY, ls="-")),
    ]
    return style.legends(figure, styles, plotted, entries)


def _rows(models: list[SweptModel], law: LrLaw | None) -> pd.DataFrame:
    best, ratios = [], []
    for model in models:
        about = {"family": model.lineage, "hidden_size": model.hidden_size}
        best += [arm | about | (grid.optimum(model.comparison, arm) or {}) for arm in (model.fullft, model.lora)]
        ratios.append(model.lora | about | grid.lr_ratio(model.log_ratio) | {"resolved": not model.problems})
    families = sorted({model.lineage for model in models})
    published = _published_optima(families)
    sizes = [model.hidden_size for model in models] + published["hidden_size"].astype(int).tolist()
    span = np.geomspace(min(sizes) / 1.25, max(sizes) * 1.25, 2)

    def law_points(curve: LrLaw) -> pd.DataFrame:
        return pd.DataFrame(
            {"family": family, "hidden_size": size, "arm": arm_label(arm), "method": arm["method"]}
            | {"lr": predict_lr(curve, family, size, arm["method"])}
            for family in sorted(set(families) & set(curve.exponents))
            for arm in (models[0].fullft, models[0].lora)
            for size in span
        )

    ten = paper_numbers()["lr_ratio_lora_over_fullft"]
    parts = {
        "optimum": pd.DataFrame(best),
        "ratio": pd.DataFrame(ratios),
        "published_law": law_points(PUBLISHED),
        "law": law_points(law) if law else pd.DataFrame(),
        "naive": pd.DataFrame({"hidden_size": span, "ratio": span / 64}),
        "reference": pd.DataFrame({"hidden_size": span, "ratio": ten}),
        "published": published,
    }
    first = models[0].fullft
    return tidy(parts, _COLUMNS).assign(**{name: first[name] for name in ("dataset", "batch_size", "steps")})


def _published_optima(families: list[str]) -> pd.DataFrame:
    """Return the published optimal LRs of FullFT, and of LoRA at each model's highest rank on all layers."""
    table = published_sweeps()
    table = table[table["family"].isin(families) & ((table["placement"] == "all") | (table["method"] == "fullft"))]
    highest = table.groupby("model")["rank"].transform("max")
    table = table[table["rank"].isna() | (table["rank"] == highest)]
    ids, nll = [str(row) for row in table.index], table["nll"]
    runs = table.assign(run_id=ids, batch_size=0, seed=0, status="done", final_valid_nll=nll, final_test_nll=nll)
    best = grid.optima(comparisons(runs, pd.DataFrame()))
    firsts = dict.fromkeys(("family", "hidden_size", "source"), "first")
    about = table.groupby(["model", "method"]).agg({**firsts, "lr": "nunique"}).rename(columns={"lr": "lrs"})
    best = best[["model", "method", "rank", "placement", "arm", "lr", "at_edge"]].join(about, on=["model", "method"])
    # A best LR that was published without its grid counts as resolved, as its source says it is best.
    return best.assign(family=best["family"].map(lineage), resolved=~(best["lrs"].gt(1) & best["at_edge"].astype(bool)))
