"""The output of `lorabench recommend` as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorabench.custom.data import UserData
from lorabench.custom.recommend import Recommendation, SeenOptimum, Setting
from lorabench.utils import formats


def recommendation_table(recommendation: Recommendation, data: UserData | None) -> None:
    """Print the settings with their sources, the optimal LRs of published and of your own runs, and the notes."""
    console = Console()
    console.print(Text(str(recommendation.model)))
    if data is not None:
        console.print(Text(str(data)))
    settings = ((setting.what, _value(setting), setting.source) for setting in recommendation.settings)
    _print(console, ("setting", "value", "source"), settings)
    if recommendation.seen:
        optima = (
            (_arm(seen), formats.lr(seen.lr), _interval(seen.low, seen.high), seen.where)
            for seen in recommendation.seen
        )
        _print(console, ("optimal LR of", "LR", "95% interval", "source"), optima)
    for note in recommendation.notes:
        console.print(Text(f"- {note}"))


def _print(console: Console, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(*columns)
    for row in rows:
        # A Text is not parsed as markup, which names of files and models might look like.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _value(setting: Setting) -> str:
    match setting.value:
        case None:
            return _interval(setting.low, setting.high)
        case str():
            return setting.value
        case _:
            return formats.lr(setting.value) if setting.name.endswith("_lr") else f"{setting.value:,}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{formats.lr(low)} to {formats.lr(high)}"


def _arm(seen: SeenOptimum) -> str:
    return "FullFT" if seen.method == "fullft" else f"LoRA r{seen.rank}"
