"""How numbers and tables are written for people: in the report, in figures and in what commands print.

Nothing but the standard library is imported at the top, since `lorabench plan` has to start at once. All functions of
values except `fixed_interval` write a missing value (None, NaN, NaT or NA) as a dash.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any

DASH = "\N{EN DASH}"
"""The text in place of a missing value."""

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SPANS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def missing(value: Any) -> bool:
    """Return whether a value of a table is null: None, NaN, NaT or NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, Real) and math.isnan(value)


def printable(text: str) -> str:
    """Return foreign text on one line, for a terminal: what is not printable is escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def number(value: Any, digits: int = 3) -> str:
    """Write a number to the given number of significant digits (2.92), a whole one below a million with all (123,456).

    A power of ten is written only below 1e-4 and from 1e6 on.
    """
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


def count(value: Any) -> str:
    """Write a number rounded to a whole one, with commas between thousands."""
    return DASH if missing(value) else f"{round(value):,}"


def nll(value: Any) -> str:
    """Write a loss in nats per token, or an accuracy, to four decimals: its noise is rarely below a thousandth."""
    return DASH if missing(value) else f"{value:.4f}"


def signed(value: Any) -> str:
    """Write a difference of losses or accuracies to four decimals, with its sign."""
    return DASH if missing(value) else f"{value:+.4f}"


def lr(value: Any, digits: int = 3) -> str:
    """Write a learning rate as a power of ten (3e-4); its mantissa has no decimals where they would all be 0."""
    if missing(value):
        return DASH
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    whole, _, decimals = mantissa.partition(".")
    return f"{mantissa if decimals.strip('0') else whole}e{int(exponent)}"


def interval(low: Any, high: Any, write: Callable[[Any], str] = number) -> str:
    """Write an interval, each end by `write`: [1.50, 2.25]."""
    return DASH if missing(low) or missing(high) else f"[{write(low)}, {write(high)}]"


def lr_interval(low: Any, high: Any) -> str:
    """Write an interval of learning rates."""
    return interval(low, high, lr)


def fixed_interval(low: float, high: float, decimals: int) -> str:
    """Write an interval to the given number of decimals, as it stands behind an estimate in a sentence."""
    return "(no interval)" if math.isnan(low + high) else f"[{low:.{decimals}f}, {high:.{decimals}f}]"


def with_interval(value: float, low: float, high: float, decimals: int, sign: str = "", unit: str = "") -> str:
    """Write an estimate with its interval in a sentence; with the sign `+`, it is never without a sign."""
    if math.isnan(value):
        return "unknown"
    return f"{value:{sign}.{decimals}f}{unit} {fixed_interval(low, high, decimals)}"


def amount(value: Any, unit: str = "") -> str:
    """Write a large quantity to three digits, with a metric prefix (steps of 1000, also for bytes): 3.50 TFLOP."""
    if missing(value):
        return DASH
    factor, prefix = next((step for step in _PREFIXES if abs(value) >= step[0]), (1, ""))
    return f"{number(value / factor)} {prefix}{unit}".strip()


def parameters(value: Any) -> str:
    """Write a count of parameters as the table of the paper's figure 4 does (0.49B), smaller ones in M and K."""
    if missing(value):
        return DASH
    if value >= 1e8:
        return f"{value / 1e9:.2f}B"
    return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value / 1e3:.1f}K"


def duration(seconds: Any) -> str:
    """Write a time span in the largest unit that it is at least two of: seconds, minutes, hours or days."""
    if missing(seconds):
        return DASH
    length, unit = next((span for span in _SPANS if seconds >= 2 * span[0]), (1, "s"))
    return f"{number(seconds / length)} {unit}"


def when(value: Any) -> str:
    """Write a time stamp (text, ISO 8601) to the minute: 2026-01-02 03:04 UTC."""
    if missing(value):
        return DASH
    return f"{value[:10]} {value[11:16]}" + (" UTC" if value.endswith("+00:00") else "")


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[str] = (),
    title: str = "",
    notes: Iterable[str] = (),
    total: bool = False,
) -> None:
    """Print a table of text, with a title and notes; `numbers` are the columns to align to the right.

    With `total` a line sets the last row apart.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    for position, row in enumerate(rows, 1):
        # A Text is not parsed as markup, which names of files and models might look like.
        table.add_row(*(Text(printable(cell)) for cell in row), end_section=total and position == len(rows) - 1)
    # Without a terminal, rich would assume a width of 80 characters and cut the columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if title:
        console.print(Text(printable(" ".join(title.split()))), soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(Text(printable(note)), soft_wrap=True)
