"""Examples and problems from a user's own file: JSONL, JSON, CSV or parquet.

The columns decide what a row is (`lorabench.config.fields.FileFormat`): a chat in `messages` or `conversations`; a
pair, which becomes a chat of two turns (`instruction` together with its `input`, if there is one); or a `text`, trained
as plain text with the end token and without a chat template, every token of it scored. A chat takes precedence over a
pair, a pair over a text.

Whatever comes from outside goes through `usable`, datasets and problem sets of the hub too: a row that can't be used is
counted in a `Tally` by its reason, never silently dropped. What is wrong with a file as a whole is a `UserError`.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.fields import FILE_SUFFIXES, FileFormat
from lorabench.config.inputs import FileDataset, FileProblems
from lorabench.data.chat import (
    FORMATS,
    Chat,
    Example,
    UnusableRowError,
    file_messages,
    formats_in,
    is_first,
    prompt,
    row_text,
    text_digest,
)
from lorabench.data.grading import BOX, gsm8k_answer, last_box, number
from lorabench.data.reasoning import Problem
from lorabench.errors import UserError

MAX_LINE_BYTES = 64 << 20
"""Longer lines of JSON, and longer fields of CSV, are not parsed."""
# Examples of reasoning datasets take 50 kB each.
_BATCH_ROWS = 256
NOT_UTF8, NO_OBJECT, NO_NUMBER = "not UTF-8", "not a JSON object", "an answer that is no number"
TOO_LONG, REPEATED = "too long", "repeats the prompt of an earlier row"

RawRow = tuple[int, dict[str, Any] | str]
"""A row as it was read: its place, which is its line in JSON lines and CSV and else its number, both counted from 1;
and its columns by name, or the reason why it can't be read."""


@dataclass
class Tally:
    """The number of rows that were read, the number of usable ones, and the reasons why the others were left out."""

    format: str
    """What the rows are read as, such as their format."""
    rows: int = 0
    usable: int = 0
    unit: str = "line"
    """What a row's place counts, `line` or `row`."""
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each reason the number of rows that were left out, and the place of the first of them."""
    columns: tuple[str, ...] = ()
    """The columns of the first row that could be read."""

    def leave_out(self, place: int, reason: str, rows: int = 1) -> None:
        """Count rows that can't be used, the first of which is at a place."""
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
    is_new: Callable[[Example], bool] = lambda example: True,
) -> Iterator[tuple[int, Example]]:
    """Yield the place and the example of each usable and new row (see `is_first`); the tally counts all rows.

    The function `parse` turns the columns of a row into an example, or raises UnusableRowError.
    """
    for place, content in rows:
        tally.rows += 1
        try:
            if isinstance(content, str):
                raise UnusableRowError(content)
            tally.columns = tally.columns or tuple(content)
            example = parse(content)
            if not is_new(example):
                raise UnusableRowError(REPEATED)
        except UnusableRowError as error:
            tally.leave_out(place, str(error))
            continue
        tally.usable += 1
        yield place, example


def json_lines(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object per line; blank lines are skipped."""
    with path.open("rb") as file:
        file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
        place = 0
        # Lines of bytes end at line feeds only, not at other line ends that texts contain, such as U+2028.
        while line := file.readline(MAX_LINE_BYTES):
            place += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (remainder := file.readline(MAX_LINE_BYTES)) and not remainder.endswith(b"\n"):
                    pass
                yield place, TOO_LONG
                continue
            try:
                if text := line.decode().strip():
                    value = json.loads(text)
                    yield place, value if isinstance(value, dict) else NO_OBJECT
            except UnicodeDecodeError:
                yield place, NOT_UTF8
            except (ValueError, RecursionError):
                yield place, "not JSON"


def parquet_rows(
    path: Path, choose: Callable[[Collection[str], str], list[str] | None] = lambda columns, name: None
) -> Iterator[RawRow]:
    """Yield the rows of a parquet file, a batch of which is held in memory.

    The function `choose` is given all columns and the file's name, and returns the columns to read, None for all.
    """
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH_ROWS, columns=choose(file.schema_arrow.names, str(path)))
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} can't be read as parquet: {reason}") from error


def file_rows(path: Path, tally: Tally) -> Iterator[RawRow]:
    """Yield all rows of a file, and set the tally's unit."""
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
    with path.open("rb") as file:
        if file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            yield from json_lines(path)
            return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is not JSON: {reason}") from error
    if not isinstance(values, list):
        raise UserError(f"{path} must be an array of objects, or hold one object per line")
    yield from enumerate((value if isinstance(value, dict) else NO_OBJECT for value in values), 1)


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
            content: dict[str, Any] | str
            try:
                content = next(reader)
                # DictReader puts fields beyond the header under the key None, and None in place of missing fields.
                if None in content or None in content.values():
                    content = f"not the {fields} fields of the header"
            except StopIteration:
                return
            except csv.Error as error:
                content = f"not CSV: {error}"
            yield reader.line_num, content


def chosen_format(path: Path) -> FileFormat:
    """Return the format that the columns of the first row with columns of a format imply; UserError if none does."""
    tally = Tally("unknown")
    for _, formats in usable(file_rows(path, tally), formats_in, tally):
        if len(formats) > 1:
            raise UserError(f"{path} may be read as {' or '.join(formats)}; set `format`")
        if formats:
            return formats[0]
    if not tally.columns and tally.bad:
        raise UserError(f"{path}: none of its {tally.rows} rows can be used: {tally.reasons()}")
    raise UserError(
        f"{path} has the columns {_names(tally.columns)}; needed are those of one format: {', '.join(FORMATS)}"
    )


def usable_chats(
    rows: Iterable[RawRow], source: str, tally: Tally, max_chars: int | None = None, group: str | None = None
) -> Iterator[Chat]:
    """Yield the usable examples among rows in the tally's format, each prompt once, of at most `max_chars`."""

    def parse(content: dict[str, Any]) -> Chat:
        chat = Chat(source_of(source, content, group), file_messages(content, tally.format))
        if max_chars is not None and chat.chars() > max_chars:
            raise UnusableRowError(TOO_LONG)
        return chat

    # Hashes take less memory than prompts.
    is_new: Callable[[Chat], bool] = is_first(lambda chat: text_digest(prompt(chat.messages)))
    return (chat for _, chat in usable(rows, parse, tally, is_new))


def source_of(source: str, content: dict[str, Any], group: str | None) -> str:
    """Return the source of a row's example, with the row's value in the column `group`, if there is one."""
    if group is None:
        return source
    try:
        return f"{source}/{row_text(content.get(group))}"
    except UnusableRowError:
        raise UnusableRowError(f"no {group!r}, which names its group") from None


def file_chats(spec: FileDataset) -> tuple[list[Chat], Tally]:
    """Return the usable examples of a dataset's file in an order that the seed decides, and the tally of its rows."""
    path = Path(spec.path)
    tally = Tally(spec.format or chosen_format(path))
    chats = list(usable_chats(file_rows(path, tally), path.name, tally, spec.max_chars, spec.group))
    return _shuffled(chats, tally, spec), tally


def file_problems(spec: FileProblems) -> tuple[list[Problem], Tally]:
    """Return the usable problems of a file, each question once, in an order that the seed decides, and the tally."""
    path, tally = Path(spec.path), Tally(f"{spec.question}/{spec.answer}")

    def parse(content: dict[str, Any]) -> Problem:
        question, answer = (row_text(content.get(name)).strip() for name in (spec.question, spec.answer))
        if len(question) > spec.max_chars:
            raise UnusableRowError(TOO_LONG)
        short = last_box(answer) or gsm8k_answer(answer) or answer
        if spec.grader == "number" and number(short) is None:
            raise UnusableRowError(NO_NUMBER)
        asks_for_box = spec.grader == "number" or "\\boxed" in question
        return Problem(source_of(path.name, content, spec.group), question if asks_for_box else question + BOX, short)

    is_new: Callable[[Problem], bool] = is_first(lambda problem: problem.key)
    problems = [problem for _, problem in usable(file_rows(path, tally), parse, tally, is_new)]
    missing = [name for name in (spec.question, spec.answer) if name not in tally.columns]
    if tally.columns and missing and not problems:
        raise UserError(f"{path} has the columns {_names(tally.columns)}; {_names(missing)} is needed")
    return _shuffled(problems, tally, spec), tally


def _shuffled(examples: list[Example], tally: Tally, spec: FileDataset | FileProblems) -> list[Example]:
    """Return examples in an order that the seed decides; UserError if there are too few."""
    needed = spec.train + spec.validation + spec.test
    if tally.usable < needed:
        why = f" ({tally.reasons()})" if tally.bad else ""
        raise UserError(
            f"{Path(spec.path)}, read as {tally.format}: {tally.usable} of its {tally.rows} rows can be used{why}; "
            f"{needed} are needed: train = {spec.train}, validation = {spec.validation}, test = {spec.test}"
        )
    Random(spec.seed).shuffle(examples)
    return examples


def _names(columns: Iterable[str]) -> str:
    # The names are quoted, since a file may hold anything.
    return ", ".join(repr(name)[:80] for name in list(columns)[:20]) or "none"
