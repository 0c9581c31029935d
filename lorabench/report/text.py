"""Numbers as a reader wants them: sensible digits, a dash for what is missing."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorabench.tables import words

if TYPE_CHECKING:
    from lorabench.config import Block

DASH = "\N{EN DASH}"


def missing(value: Any) -> bool:
    """Whether a value of a table is null."""
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def number(value: Any, digits: int = 3) -> str:
    """A number to that many significant digits, whole numbers as they are; a power of ten only where it must be."""
    if missing(value):
        return DASH
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return lr(value, digits)


def signed(value: Any) -> str:
    """A difference of losses or shares, with its sign."""
    return DASH if missing(value) else f"{value:+.4f}"


def nll(value: Any) -> str:
    """A loss in nats per token; its noise is rarely below a thousandth."""
    return DASH if missing(value) else f"{value:.4f}"


def lr(value: Any, digits: int = 3) -> str:
    """A learning rate: `3e-4`, `2.27e-3`."""
    if missing(value):
        return DASH
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    whole, _, decimals = mantissa.partition(".")
    return f"{mantissa if decimals.strip('0') else whole}e{int(exponent)}"


def interval(low: Any, high: Any) -> str:
    """An interval of numbers."""
    return DASH if missing(low) or missing(high) else f"[{number(low)}, {number(high)}]"


def lr_interval(low: Any, high: Any) -> str:
    """An interval of learning rates."""
    return DASH if missing(low) or missing(high) else f"[{lr(low)}, {lr(high)}]"


def count(value: Any) -> str:
    """A whole number."""
    return DASH if missing(value) else f"{int(value):,}"


def amount(value: Any, unit: str = "") -> str:
    """A large number with a metric prefix: `1.24 M`, `3.5 TFLOP`."""
    if missing(value):
        return DASH
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{number(value / factor)} {prefix}{unit}".strip()
    return f"{number(value)} {unit}".strip()


def duration(seconds: Any) -> str:
    """A time span in seconds, minutes, hours or days."""
    if missing(seconds):
        return DASH
    for length, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{number(seconds / length)} {name}"
    return f"{number(seconds)} s"


def when(value: Any) -> str:
    """A time stamp (ISO 8601) to the minute."""
    if missing(value):
        return DASH
    return f"{value[:10]} {value[11:16]}" + (" UTC" if value.endswith("+00:00") else "")


def text(value: Any) -> str:
    """Any other value; a list is joined by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(text(part) for part in value) or DASH
    return DASH if missing(value) or value == "" else str(value)


def in_paper(figure: Any) -> str:
    """Where the paper says it, by the column `figure` of a claim."""
    where = text(figure)
    return f"fig. {where}" if where[0].isdigit() else where


def parametrisation(block: Block) -> str:
    """How a block's LoRA differs from the paper's parametrisation."""
    parts = [f"alpha {_listed(block.alphas)}"] if block.alphas else []
    if block.alpha_power:
        parts.append(f"alpha times rank^{block.alpha_power:g}")
    if block.inits_a != [1.0]:
        parts.append(f"init of A times {_listed(block.inits_a)}")
    if block.lr_ratios != [1.0]:
        parts.append(f"LR of B / LR of A {_listed(block.lr_ratios)}")
    if block.transforms:
        parts.append("p, q " + " and ".join(_listed(pair) for pair in block.transforms))
    if block.eps is not None:
        parts.append(f"Adam's epsilon {block.eps:g}")
    return "; ".join(parts) or "standard"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def anchor_run(run_id: Any) -> str:
    """The id of a run's row, safe in a link."""
    return f"run-{_safe(run_id)}"


def anchor_claim(claim_id: Any) -> str:
    """The id of a claim's row, safe in a link."""
    return f"claim-{_safe(claim_id)}"


def _safe(name: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", str(name))


FILTERS = {
    function.__name__: function
    for function in (
        *(number, signed, nll, lr, interval, lr_interval, count, amount, duration, when, text, words),
        *(in_paper, parametrisation, anchor_run, anchor_claim),
    )
}
