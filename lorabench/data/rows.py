"""Rows of data files: read one at a time, turned into usable examples, and counted where they can't be used.

Whatever comes from outside goes through `usable`: a user's own file (`lorabench.data.files`) as well as datasets and
problem sets of the Hugging Face hub (`lorabench.data.hub`, `lorabench.data.problems`). These sources say how a row
becomes an example; the reading, the filtering and the `Tally` of what was left out are here.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.fields import FILE_SUFFIXES
from lorabench.errors import UserError

MAX_LINE_BYTES = 64 << 20
"""Longer lines of JSON, and longer fields of CSV, are not parsed."""
# Examples of reasoning datasets take 50 kB each.
_BATCH_ROWS = 256

NOT_UTF8, TOO_LONG, REPEATED = "not UTF-8", "too long", "repeats the prompt of an earlier row"

Example = TypeVar("Example")

Choose = Callable[[Collection[str], str], list[str]]
"""Selects the columns to read among those of a row or file, given with where they are (for messages); raises UserError
if a needed column is missing."""


class Unreadable(str):
    """The reason why a row can't be read, in place of its content."""

    __slots__ = ()


class RawRow(NamedTuple):
    """A row as it was read: its place, counted from 1 (the line, in JSON lines and CSV), and its columns by name."""

    place: int
    content: dict[str, Any] | Unreadable


class UnusableRowError(ValueError):
    """A row's content is not a usable example; the message is the reason."""


@dataclass
class Tally:
    """The number of rows that were read, the number of usable ones, and the reasons why the others were left out.

    Attributes:
        format: what the rows are read as, such as their format.
        rows: rows that were read.
        usable: rows that can be used.
        unit: what a row's place counts, `line` or `row`.
    """

    format: str
    rows: int = 0
    usable: int = 0
    unit: str = "line"
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each reason the number of rows that were left out, and the place of the first of them."""
    columns: tuple[str, ...] = ()
    """The columns of the first row that could be read."""

    def leave_out(self, place: int, reason: str, rows: int = 1) -> None:
        """Count rows that can't be used.

        Args:
            place: the place of the first of them.
        """
        count, first = self.bad.get(reason, (0, place))
        self.bad[reason] = count + rows, min(first, place)

    def reasons(self) -> str:
        """Return the reasons as text, `3 no text (first: line 7), 1 too long (line 9)`; empty if there are none."""
        most_first = sorted(self.bad.items(), key=lambda item: -item[1][0])
        return ", ".join(
            f"{count} {reason} ({'first: ' if count > 1 else ''}{self.unit} {first})"
            for reason, (count, first) in most_first
        )

    def __str__(self) -> str:
        left_out = f"; left out: {self.reasons()}" if self.bad else ""
        return f"{self.usable} of {self.rows} rows can be used as {self.format}{left_out}"

    def plain(self) -> dict[str, Any]:
        """Return the tally as plain data for JSON."""
        bad = [{"reason": reason, "rows": count, "first": first} for reason, (count, first) in self.bad.items()]
        return {"format": self.format, "rows": self.rows, "usable": self.usable, "unit": self.unit, "bad": bad}


def usable(
    rows: Iterable[RawRow],
    parse: Callable[[dict[str, Any]], Example],
    tally: Tally,
    identity: Callable[[Example], Hashable] | None = None,
) -> Iterator[tuple[int, Example]]:
    """Yield the place and the example of each usable row, in the order of the rows.

    Args:
        rows: the rows of a source.
        parse: turns the columns of a row into an example; raises UnusableRowError if they are none.
        tally: the rows are counted here as they are read.
        identity: returns what identifies an example, so that later ones with the same identity are left out; None to
            keep them all.
    """
    seen: set[Hashable] = set()
    for place, content in rows:
        tally.rows += 1
        try:
            if isinstance(content, Unreadable):
                raise UnusableRowError(content)
            tally.columns = tally.columns or tuple(content)
            example = parse(content)
            if identity is not None:
                key = identity(example)
                if key in seen:
                    raise UnusableRowError(REPEATED)
                seen.add(key)
        except UnusableRowError as error:
            tally.leave_out(place, str(error))
            continue
        tally.usable += 1
        yield place, example


def text_lines(path: Path) -> Iterator[tuple[int, str | Unreadable]]:
    """Yield the lines of a UTF-8 file with their numbers from 1, without line ends; blank lines are skipped."""
    with path.open("rb") as file:
        file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
        place = 0
        # Lines of bytes end at line feeds only, not at other line ends that texts contain, such as U+2028.
        while line := file.readline(MAX_LINE_BYTES):
            place += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (remainder := file.readline(MAX_LINE_BYTES)) and not remainder.endswith(b"\n"):
                    pass
                yield place, Unreadable(TOO_LONG)
                continue
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield place, Unreadable(NOT_UTF8)
                continue
            if text.strip():
                yield place, text


def json_lines(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object per line."""
    for place, line in text_lines(path):
        yield RawRow(place, line if isinstance(line, Unreadable) else _parsed(line))


def _parsed(line: str) -> dict[str, Any] | Unreadable:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Unreadable("not JSON")
    return value if isinstance(value, dict) else Unreadable("not a JSON object")


def parquet_rows(path: Path, choose: Choose | None = None) -> Iterator[RawRow]:
    """Yield the rows of a parquet file, a batch of which is held in memory; by default with all columns.

    Raises:
        UserError: the file is not parquet, or is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            columns = choose(file.schema_arrow.names, str(path)) if choose is not None else None
            place = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for content in batch.to_pylist():
                    place += 1
                    yield RawRow(place, content)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} can't be read as parquet: {reason}") from error


def file_rows(path: Path, tally: Tally) -> Iterator[RawRow]:
    """Yield all rows of a file, and set the tally's unit.

    Raises:
        UserError: the file can't be read, is empty, or is of another kind.
    """
    readers = {".jsonl": json_lines, ".json": _json_rows, ".csv": _csv_rows, ".parquet": parquet_rows}
    if path.suffix not in readers:
        raise UserError(f"data file {str(path)!r} must end in one of {', '.join(FILE_SUFFIXES)}")
    tally.unit = "line" if path.suffix in (".jsonl", ".csv") else "row"
    empty = True
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not start:
            raise UserError(f"{path} is empty")
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is UTF-16; save it as UTF-8")
        for row in readers[path.suffix](path):
            empty = False
            yield row
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    if empty:
        raise UserError(f"{path} has no rows")


def _json_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of an array of objects, held in memory, or of one object per line, as in many .json files."""
    first = next((line.lstrip()[:1] for _, line in text_lines(path) if not isinstance(line, Unreadable)), "")
    if first == "{":
        yield from json_lines(path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not JSON: {reason}") from error
    if not isinstance(values, list):
        raise UserError(f"{path} must be an array of objects, or hold one object per line")
    for place, value in enumerate(values, 1):
        yield RawRow(place, value if isinstance(value, dict) else Unreadable("not a JSON object"))


def _csv_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a CSV file with a header; the place of a row whose fields hold line ends is its last line."""
    # Python's limit is 128 KiB by default, and holds for the whole process.
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are not UTF-8 become lone surrogates, so that their row is unusable and not the whole file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            fields = len(reader.fieldnames or ())
        except csv.Error as error:
            raise UserError(f"{path} is not CSV: {error}") from error
        while True:
            try:
                content = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(reader.line_num, Unreadable(f"not CSV: {error}"))
                continue
            # DictReader puts fields beyond the header under the key None, and None in place of missing fields.
            complete = None not in content and None not in content.values()
            yield RawRow(
                reader.line_num, dict(content) if complete else Unreadable(f"not the {fields} fields of the header")
            )
