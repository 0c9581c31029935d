"""Markdown for pages that are partly written by programs: tables, and parts between marker lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorabench.errors import UserError
from lorabench.utils.files import atomic_path


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table; what would be markup in the cells is escaped."""
    header = list(header)
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(escaped(str(cell)) for cell in row)} |" for row in rows),
    ]


def escaped(text: str) -> str:
    """Return text for Markdown, also for the cell of a table: markup of HTML is shown as it is, code is set as code."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def with_part(text: str, page: Path, name: str, writer: str, part: str) -> str:
    """Return the text of a page with a part between its markers, of which the first names its `writer`.

    UserError says that the page has no place for the part.
    """
    start, end = f"<!-- {name}: written by {writer} -->", f"<!-- end of {name} -->"
    before, start_in_text, rest = text.partition(start)
    _, end_in_text, after = rest.partition(end)
    if not (start_in_text and end_in_text):
        raise UserError(f"{page} has no place for its generated part: it needs the two lines {start} and {end}")
    return f"{before}{start}\n{part}\n{end}{after}"


def write_part(page: Path, name: str, writer: str, part: str) -> None:
    """Write a text between the markers of a part of a page; see `with_part`."""
    text = with_part(page.read_text(encoding="utf-8"), page, name, writer, part)
    with atomic_path(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
