"""How numbers and tables are written for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Sequence


def printable(text: str) -> str:
    """Return foreign text on one line, for a terminal: what is not printable, such as control characters, is escaped.

    >>> print(printable("a\\x1b[31m\\nb"))
    a\\x1b[31m\\nb
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def number(value: float) -> str:
    """Write a number to three significant digits, whole ones below a million with all of theirs.

    >>> [number(value) for value in (2.9182, 2.8, 12, 123456.7, 1.5e-7)]
    ['2.92', '2.80', '12', '123,457', '1.50e-7']
    """
    if not math.isfinite(value):
        return str(value)
    if value == round(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        decimals = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return lr(value)


def lr(value: float, digits: int = 3) -> str:
    """Write a learning rate as a power of ten; its mantissa has no decimals where they would all be 0.

    >>> [lr(value) for value in (3e-4, 2.266e-3, 1.0)]
    ['3e-4', '2.27e-3', '1e0']
    """
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    whole, _, decimals = mantissa.partition(".")
    return f"{mantissa if decimals.strip('0') else whole}e{int(exponent)}"


def parameters(value: float) -> str:
    """Write a count of parameters as the table of the paper's figure 4 does (0.49B), smaller ones in M and K.

    >>> [parameters(value) for value in (487_000_000, 2_621_440, 1_536)]
    ['0.49B', '2.62M', '1.5K']
    """
    if value >= 1e8:
        return f"{value / 1e9:.2f}B"
    return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value / 1e3:.1f}K"


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Collection[str] = (),
    title: str = "",
    notes: Iterable[str] = (),
) -> None:
    """Print a table of text with a title above and notes below; the columns `numbers` are aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        # A Text is not parsed as markup, which names of files and models might look like.
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Without a terminal, rich would assume a width of 80 characters and cut the columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if title:
        console.print(Text(printable(" ".join(title.split()))), soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(Text(printable(note)), soft_wrap=True)
