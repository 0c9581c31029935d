"""What `lorabench recommend` prints for a reader."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorabench.own.data import Data
from lorabench.own.recommend import Recommendation, Seen, Setting
from lorabench.utils import formats


def recommendation_table(found: Recommendation, data: Data | None) -> None:
    """Settings with their sources, then what others and your own runs found, then notes."""
    console = Console()
    console.print(Text(str(found.model)))
    if data is not None:
        console.print(Text(str(data)))
    settings = ((one.what, _value(one), one.source) for one in found.settings)
    _print(console, ("setting", "value", "source"), settings)
    if found.seen:
        seen = ((_arm(one), formats.lr(one.lr), _interval(one.low, one.high), one.where) for one in found.seen)
        _print(console, ("optimum found", "LR", "95% interval", "where"), seen)
    for note in found.notes:
        console.print(Text(f"- {note}"))


def _print(console: Console, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        # As text: names of files and models are no markup.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _value(one: Setting) -> str:
    match one.value:
        case None:
            return _interval(one.low, one.high)
        case str():
            return one.value
        case _:
            return formats.lr(one.value) if one.name.endswith("_lr") else f"{one.value:,}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{formats.lr(low)} to {formats.lr(high)}"


def _arm(one: Seen) -> str:
    return "FullFT" if one.method == "fullft" else f"LoRA r{one.rank}"
