"""The part of a page between two marker lines, which is written by a program; the text around it is written by hand."""

from __future__ import annotations

from pathlib import Path

from lorabench.errors import UserError
from lorabench.utils.files import atomic_path


def text_around(page: Path, start: str, end: str) -> tuple[str, str]:
    """Return the text of a page before its start marker and after its end marker.

    Raises:
        UserError: the page lacks one of the two marker lines.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, found_start, inside = text.partition(start)
    _, found_end, after = inside.partition(end)
    if not (found_start and found_end):
        raise UserError(f"{page} has no place for its generated part: it needs the two lines {start} and {end}")
    return before, after


def write_around(page: Path, around: tuple[str, str], block: str) -> None:
    """Write a page from a block, with its markers, and the text around it (see `text_around`)."""
    before, after = around
    with atomic_path(page) as partial:
        partial.write_text(before + block + after, encoding="utf-8")
