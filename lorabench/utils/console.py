"""How commands print tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Collection[str] = (),
    title: str = "",
    notes: Iterable[str] = (),
    total: bool = False,
) -> None:
    """Print a table of text to the standard output.

    Args:
        columns: the names of the columns.
        rows: the cells of each row.
        numbers: the columns that are aligned to the right.
        title: a line above the table.
        notes: sentences below the table.
        total: whether a line sets the last row apart.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    cells = list(rows)
    for number, row in enumerate(cells, 1):
        if total and number == len(cells):
            table.add_section()
        # A Text is not parsed as markup, which names of files and models might look like.
        table.add_row(*map(Text, row))
    # Without a terminal, rich would assume a width of 80 characters and cut the columns.
    console = Console(width=None if sys.stdout.isatty() else 150)
    if title:
        console.print(Text(title), soft_wrap=True)
    console.print(table)
    for note in notes:
        console.print(Text(note), soft_wrap=True)
