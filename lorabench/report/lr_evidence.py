"""The generated part of the page on recommended learning rates: what is known, and how far off the rules would be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.pooled_lr import PRIORS, PooledLr
from lorabench.sources.lr_left_out import METHODS, RULES, by_source, compared
from lorabench.sources.lr_optima import AUTHORS, optima_of_table
from lorabench.sources.measurements import Z
from lorabench.utils import formats

START = "<!-- learning rates: written by `lorabench evidence`, never by hand -->"
END = "<!-- end of learning rates -->"

PAGE = Path("docs/recommended-lr.md")
"""The page on recommended learning rates."""

_TITLES = {"fullft": "FullFT", "lora": "LoRA"}
_COEFFICIENTS = {"offset": "offset from the law", "batch_size": "exponent of the batch size", "steps": "of the steps"}


def lr_block(optima: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Return the tables of the page.

    Args:
        optima: the table of known optima.
        rows: as from `lorabench.sources.lr_left_out.left_out`.
    """
    sources = by_source(rows)
    comparison = compared(sources)
    lines = [
        START,
        "## Left out, one source at a time",
        "",
        *_sentences(comparison),
        "",
        "![How far off each rule would have been](published/evidence/lr_left_out.svg)",
        "",
        *_comparison(comparison),
        "",
        *_sources(sources),
        "",
        "## What the pooled fit found",
        "",
        *_fits(optima),
        "",
        "## The known optima",
        "",
        *_optima(optima),
        END,
    ]
    return "\n".join(lines)


def _sentences(comparison: pd.DataFrame) -> list[str]:
    """Say for each task and method whether pooling is closer than the law."""
    lines = []
    for key, part in comparison.groupby(["task", "method"], sort=False):
        task, method = map(str, key)
        at = part.set_index("rule").to_dict("index")
        pooled, law, law_sqrt = at["pooled"], at["law"], at["law_sqrt"]
        low, high = pooled["against_law_low"], pooled["against_law_high"]
        if high < 1:
            said = "Pooling beats the law"
        elif low > 1:
            said = "The law beats pooling"
        else:
            nearer = "closer" if pooled["off"] < law["off"] else "further off"
            said = f"Pooling is {nearer}, and the difference is not decided"
        lines.append(
            f"- {task.upper()}, {_TITLES[method]}: over {pooled['sources']} sources the pooled LR is off by a factor "
            f"of {pooled['off']:.2f}, the law's by {law['off']:.2f} (with the square root of the batch size "
            f"{law_sqrt['off']:.2f}). {said} (ratio {pooled['against_law']:.2f} [{low:.2f}, {high:.2f}]); it is closer "
            f"in {pooled['closer']} of {pooled['sources']} sources. The 80% interval holds {pooled['inside_80']:.0%} "
            f"of the measured optima, the 95% interval {pooled['inside_95']:.0%}."
        )
    return lines


def _comparison(comparison: pd.DataFrame) -> list[str]:
    lines = [
        "| task, method | rule | sources | off by a factor of | worst source | over the law, 95% interval | loss above "
        "the best (sources with grids) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in comparison.to_dict("records"):
        against = (
            formats.DASH
            if row["rule"] == "law"
            else f"{row['against_law']:.2f} [{row['against_law_low']:.2f}, {row['against_law_high']:.2f}]"
        )
        lines.append(
            f"| {row['task'].upper()}, {_TITLES[row['method']]} | {RULES[row['rule']]} | {row['sources']} "
            f"| {row['off']:.2f} | {row['worst']:.1f} | {against} | {_loss(row)} ({row['grids']}) |"
        )
    return lines


def _sources(sources: pd.DataFrame) -> list[str]:
    lines = [
        "| task, method | source | optima | pooled: predicted / measured | law: predicted / measured | inside of 80%, "
        "95% | loss above the best: pooled | law |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, part in sources.groupby(["task", "method", "source"], sort=False):
        task, method, source = map(str, key)
        at = part.set_index("rule").to_dict("index")
        pooled, law = at["pooled"], at["law"]
        note = " (the law was fitted to it)" if source == AUTHORS else ""
        inside = (
            f"{pooled['inside_80']:.0%}, {pooled['inside_95']:.0%}" if pooled["optima"] else "at the edges of its grids"
        )
        cells = (
            f"{task.upper()}, {_TITLES[method]}",
            f"{source}{note}",
            pooled["optima"],
            _factor(pooled["signed"]),
            _factor(law["signed"]),
            inside,
            *(_loss({**row, "task": task}) for row in (pooled, law)),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


def _factor(value: float) -> str:
    return formats.DASH if math.isnan(value) else f"{value:.2f}"


def _loss(row: dict[Any, Any]) -> str:
    if math.isnan(row["loss_above_best"]):
        return formats.DASH
    least = "at least " if row.get("at_least") else ""
    return (
        f"{least}{row['loss_above_best']:.4f} nats"
        if row["task"] == "sft"
        else f"{least}{row['loss_above_best']:.3f} accuracy"
    )


def _fits(optima: pd.DataFrame) -> list[str]:
    priors = "; ".join(f"{_COEFFICIENTS[name]} {prior.mean:g} ± {prior.sd:g}" for name, prior in PRIORS.items())
    lines = [
        f"Priors: {priors}; the offset has none. A factor of 1 is the law.",
        "",
        "| task, method | optima, sources | all sources over the law | exponent of the batch size | exponent of the "
        "steps | SD between sources, as a factor | effective coefficients |",
        "|---|---|---|---|---|---|---|",
    ]
    counted = [optimum for optimum in optima_of_table(optima) if optimum.counts]
    for rl in (False, True):
        for method in METHODS:
            chosen = [optimum.pooled for optimum in counted if (optimum.rl, optimum.method) == (rl, method)]
            pooled = PooledLr(chosen)
            offset, batch, steps = (pooled.coefficients[name] for name in ("offset", "batch_size", "steps"))
            low, of_law, high = (math.exp(offset[0] + sds * offset[1]) for sds in (-Z, 0, Z))
            exponents = " | ".join(f"{mean:+.2f} ± {sd:.2f}" for mean, sd in (batch, steps))
            lines.append(
                f"| {'RL' if rl else 'SFT'}, {_TITLES[method]} | {len(chosen)}, {len(pooled.sources)} "
                f"| {of_law:.2f} [{low:.2f}, {high:.2f}] | {exponents} "
                f"| {math.exp(pooled.between):.1f} | {pooled.effective_parameters:.1f} |"
            )
    return lines


def _optima(optima: pd.DataFrame) -> list[str]:
    lines = [
        "| source | model | data | width | batch size | steps | alpha | method | optimal LR | error, as a factor | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in optima.to_dict("records"):
        numbers = (
            formats.DASH if math.isnan(row[name]) else f"{row[name]:.0f}"
            for name in ("width", "batch_size", "steps", "alpha")
        )
        rank = "" if pd.isna(row["rank"]) else f" r{row['rank']}"
        cells = (
            row["source"],
            row["model"],
            f"{row['dataset'] or formats.DASH}{', RL' if row['rl'] else ''}",
            *numbers,
            f"{_TITLES[row['method']]}{rank}",
            formats.lr(row["lr"]),
            formats.DASH if math.isnan(row["error"]) else f"{math.exp(row['error']):.2f}",
            row["remark"] + ("" if row["counts"] else "; it does not count"),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines
