"""Examples and problems from a file of your own: JSONL, JSON, CSV or parquet.

What a row is, is told by its columns (`config.FileFormat`): a chat in `messages` or `conversations`; a pair, which
becomes a chat of two turns (`instruction` with its `input`, if there is one); or a `text`, trained as plain text with
the end token and without a chat template, all of it scored. A chat comes before a pair, a pair before a text.

The file is read row by row. A row that can't be used is counted by its reason, never silently dropped; what is wrong
with the whole file is one sentence.
"""

from __future__ import annotations

import codecs
import csv
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config import FILE_SUFFIXES, FileDataset, FileFormat, FileProblems
from lorabench.data.answers import gsm8k_answer, last_box, number
from lorabench.data.chat import Chat, Messages, is_example, prompt_digest
from lorabench.data.hub import ROLES
from lorabench.data.hub_problems import BOX
from lorabench.data.reasoning import Problem
from lorabench.errors import UserError

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)

# Longer lines and fields are not even parsed.
MAX_LINE_BYTES = 64 << 20
_BATCH_ROWS = 1000

NOT_UTF8, TOO_LONG, REPEATED = "not UTF-8", "too long", "repeats the prompt of an earlier row"
NO_TEXT, NO_CHAT, NO_ASSISTANT = "no text", "not a list of turns", "does not end with a turn of the assistant"
NOT_UNICODE, NO_NUMBER = "text that is not valid Unicode", "an answer that is no number"


class Bad(str):
    """Why a row can't be used."""

    __slots__ = ()


class Row(NamedTuple):
    """A row of a file: its place, counted from 1 (the line, in JSONL and CSV), and what stands there."""

    place: int
    content: dict[str, Any] | Bad


class UnusableError(ValueError):
    """A row's content can't be used; the message is the reason."""


@dataclass
class Tally:
    """What was found in a file."""

    format: str
    rows: int = 0
    usable: int = 0
    unit: str = "line"
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By reason: how many rows, and the place of the first."""

    def count(self, row: Row, reason: str) -> None:
        """Count a bad row."""
        count, first = self.bad.get(reason, (0, row.place))
        self.bad[reason] = count + 1, first

    def reasons(self) -> str:
        """`3 no text (first: line 7), 1 too long (line 9)`; empty without bad rows."""
        most_first = sorted(self.bad.items(), key=lambda item: -item[1][0])
        return ", ".join(
            f"{count} {reason} ({'first: ' if count > 1 else ''}{self.unit} {first})"
            for reason, (count, first) in most_first
        )

    def __str__(self) -> str:
        bad = f"; left out: {self.reasons()}" if self.bad else ""
        return f"{self.usable} of {self.rows} rows can be used as {self.format}{bad}"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        bad = [{"reason": reason, "rows": count, "first": first} for reason, (count, first) in self.bad.items()]
        return {"format": self.format, "rows": self.rows, "usable": self.usable, "unit": self.unit, "bad": bad}


def file_chats(spec: FileDataset) -> Iterator[Chat]:
    """The usable examples of a file, each prompt once, in an order that the seed decides.

    They wait in a temporary file meanwhile, so memory holds none but the one that is yielded.

    Raises:
        UserError: the file can't be read, or has too few usable rows.
    """
    path = Path(spec.path)
    tally = Tally(chosen_format(path, spec.format))
    with tempfile.TemporaryFile() as waiting:
        starts = array("q")
        for chat in usable_chats(path, tally, spec.max_chars):
            starts.append(waiting.tell())
            waiting.write(json.dumps(chat.messages).encode() + b"\n")
        _check_enough(path, tally, spec)
        Random(spec.seed).shuffle(starts)
        for start in starts:
            waiting.seek(start)
            yield Chat(path.name, json.loads(waiting.readline()))


def file_problems(spec: FileProblems) -> tuple[list[Problem], Tally]:
    """The usable problems of a file, each question once, in an order that the seed decides; and what was found.

    Raises:
        UserError: the file can't be read, lacks a column, or has too few usable rows.
    """
    path, tally = Path(spec.path), Tally(f"{spec.question}/{spec.answer}")
    problems: list[Problem] = []
    seen: set[str] = set()
    columns: list[str] = []
    for row in _rows(path, tally):
        try:
            content = _object(row)
            columns = columns or list(content)
            problem = _problem(content, spec, path.name)
            if problem.key in seen:
                raise UnusableError(REPEATED)
        except UnusableError as error:
            tally.count(row, str(error))
            continue
        seen.add(problem.key)
        problems.append(problem)
        tally.usable += 1
    missing = [name for name in (spec.question, spec.answer) if name not in columns]
    if columns and missing and not problems:
        raise UserError(f"{path} has the columns {_names(columns)}; {_names(missing)} is needed")
    _check_enough(path, tally, spec)
    Random(spec.seed).shuffle(problems)
    return problems, tally


def tally_of(spec: FileDataset | FileProblems) -> Tally:
    """What is found in a dataset's file, read once through.

    Raises:
        UserError: as `file_chats` and `file_problems`.
    """
    if isinstance(spec, FileProblems):
        return file_problems(spec)[1]
    path = Path(spec.path)
    tally = Tally(chosen_format(path, spec.format))
    for _ in usable_chats(path, tally, spec.max_chars):
        pass
    return tally


def usable_chats(path: Path, tally: Tally, max_chars: int | None = None) -> Iterator[Chat]:
    """The usable examples in the order of the file, each prompt once.

    Args:
        path: the file.
        tally: its format; rows are counted there as they are read.
        max_chars: longer ones are bad; None for no limit.

    Raises:
        UserError: the file can't be read.
    """
    return usable_rows(_rows(path, tally), path.name, tally, max_chars)


def usable_rows(rows: Iterable[Row], source: str, tally: Tally, max_chars: int | None) -> Iterator[Chat]:
    """The usable examples among rows that were read elsewhere; see `usable_chats`."""
    # Hashes take less memory than prompts.
    seen: set[int] = set()
    for row in rows:
        try:
            chat = Chat(source, to_messages(_object(row), tally.format))
            if max_chars is not None and chat.chars() > max_chars:
                raise UnusableError(TOO_LONG)
            key = prompt_digest(chat.messages)
            if key in seen:
                raise UnusableError(REPEATED)
        except UnusableError as error:
            tally.count(row, str(error))
            continue
        seen.add(key)
        tally.usable += 1
        yield chat


def chosen_format(path: Path, wanted: FileFormat | None = None) -> FileFormat:
    """The format asked for, else the one that the columns of the first telling row leave no choice about.

    Raises:
        UserError: the columns tell nothing, or several things; or the file can't be read.
    """
    if wanted is not None:
        return wanted
    columns: list[str] = []
    tally = Tally("unknown")
    for row in _rows(path, tally):
        if isinstance(row.content, Bad):
            tally.count(row, row.content)
            continue
        columns = columns or list(row.content)
        if found := formats_in(row.content):
            if len(found) > 1:
                raise UserError(f"{path} may be read as {' or '.join(found)}; set `format`")
            return found[0]
    if not columns and tally.bad:
        raise UserError(f"{path}: none of its {tally.rows} rows can be used: {tally.reasons()}")
    raise UserError(f"{path} has the columns {_names(columns)}; needed are those of one format: {', '.join(FORMATS)}")


def formats_in(columns: Iterable[str]) -> list[FileFormat]:
    """The formats whose columns are all there, of the most telling kind: a chat, a pair, a text."""
    there = set(columns)
    found = [name for name in FORMATS if there.issuperset(name.split("/"))]
    chats: list[FileFormat] = [name for name in found if name in ("messages", "conversations")]
    return chats[:1] or [name for name in found if "/" in name] or found


def to_messages(content: dict[str, Any], format_name: str) -> Messages:
    """A row as role and content.

    Raises:
        UnusableError: it is no example of that format.
    """
    names = format_name.split("/")
    if format_name == "text":
        messages = [{"role": "text", "content": _text(content.get("text"))}]
    elif len(names) == 1:
        messages = _turns(content.get(format_name))
    else:
        asked, answered = (content.get(name) for name in names)
        if names[0] == "instruction" and content.get("input"):
            asked = f"{_text(asked)}\n\n{_text(content['input'])}"
        messages = [*_side(asked, "user"), *_side(answered, "assistant")]
    if not is_example(messages):
        raise UnusableError(NO_ASSISTANT)
    return messages


def _side(value: Any, role: str) -> Messages:
    """One side of a pair: a text, or turns of its own."""
    return _turns(value) if isinstance(value, list) else [{"role": role, "content": _text(value)}]


def _turns(value: Any) -> Messages:
    if not value:
        raise UnusableError(NO_TEXT)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UnusableError(NO_CHAT)
    messages = []
    for turn in value:
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise UnusableError(f"a turn of unknown role (known: {', '.join(ROLES)})")
        content = turn.get("content") or turn.get("value")
        # Many data sets have a system prompt that is empty.
        if ROLES[role] != "system" or content:
            messages.append({"role": ROLES[role], "content": _text(content)})
    return messages


def _text(value: Any) -> str:
    """A value as text; numbers too, as JSON and parquet have answers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    text = str(value) if is_number else value
    if not isinstance(text, str) or not text.strip():
        raise UnusableError(NO_TEXT)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableError(NOT_UNICODE) from None
    return text


def _problem(content: dict[str, Any], spec: FileProblems, source: str) -> Problem:
    question, answer = _text(content.get(spec.question)).strip(), _text(content.get(spec.answer)).strip()
    if len(question) > spec.max_chars:
        raise UnusableError(TOO_LONG)
    short = last_box(answer) or gsm8k_answer(answer) or answer
    if spec.grader == "number":
        if number(short) is None:
            raise UnusableError(NO_NUMBER)
        return Problem(source, question, short)
    return Problem(source, question if "\\boxed" in question else question + BOX, short)


def _object(row: Row) -> dict[str, Any]:
    if isinstance(row.content, Bad):
        raise UnusableError(row.content)
    return row.content


def _check_enough(path: Path, tally: Tally, spec: FileDataset | FileProblems) -> None:
    wanted = spec.train + spec.validation + spec.test
    if tally.usable >= wanted:
        return
    why = f" ({tally.reasons()})" if tally.bad else ""
    raise UserError(
        f"{path}, read as {tally.format}: {tally.usable} of its {tally.rows} rows can be used{why}; {wanted} are asked "
        f"for: train = {spec.train}, validation = {spec.validation}, test = {spec.test}"
    )


def _names(columns: Iterable[str]) -> str:
    # Quoted, since what a file holds may be anything.
    return ", ".join(repr(name)[:80] for name in list(columns)[:20]) or "none"


def _rows(path: Path, tally: Tally) -> Iterator[Row]:
    """All rows of a file, counted; a row that is none is Bad.

    Raises:
        UserError: it is no such file, can't be read, or is empty.
    """
    readers = {".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix not in readers:
        raise UserError(f"data file {str(path)!r} must end in one of {', '.join(FILE_SUFFIXES)}")
    tally.unit = "line" if path.suffix in (".jsonl", ".csv") else "row"
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not start:
            raise UserError(f"{path} is empty")
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path} is UTF-16; save it as UTF-8")
        for row in readers[path.suffix](path):
            tally.rows += 1
            yield row
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    if not tally.rows:
        raise UserError(f"{path} has no rows")


def _lines(path: Path) -> Iterator[tuple[int, str | Bad]]:
    """Lines with their number, without their ends and a byte-order mark; blank ones are left out."""
    with path.open("rb") as file:
        file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
        place = 0
        while line := file.readline(MAX_LINE_BYTES):
            place += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield place, Bad(TOO_LONG)
                continue
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield place, Bad(NOT_UTF8)
                continue
            if text.strip():
                yield place, text


def _json_lines(path: Path) -> Iterator[Row]:
    for place, line in _lines(path):
        yield Row(place, line if isinstance(line, Bad) else _parsed(line))


def _parsed(line: str) -> dict[str, Any] | Bad:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Bad("not JSON")
    return value if isinstance(value, dict) else Bad("not a JSON object")


def _json_rows(path: Path) -> Iterator[Row]:
    """Of an array of objects, held in memory; or an object a line, as many files called .json are."""
    first = next((line.lstrip()[:1] for _, line in _lines(path) if not isinstance(line, Bad)), "")
    if first == "{":
        yield from _json_lines(path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} is no JSON: {reason}") from error
    if not isinstance(values, list):
        raise UserError(f"{path} must be an array of objects, or an object a line")
    for place, value in enumerate(values, 1):
        yield Row(place, value if isinstance(value, dict) else Bad("not a JSON object"))


def _csv_rows(path: Path) -> Iterator[Row]:
    """With a header. A field may hold line ends; the place is its last line."""
    # Python's limit is 128 KiB, and one for the whole process.
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are no UTF-8 stay halves of surrogate pairs, so that their row is bad and not the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        try:
            fields = len(reader.fieldnames or ())
        except csv.Error as error:
            raise UserError(f"{path} is no CSV: {error}") from error
        while True:
            try:
                content = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(reader.line_num, Bad(f"not CSV: {error}"))
                continue
            # DictReader puts fields beyond the header under None, and gives None for those that are missing.
            whole = None not in content and None not in content.values()
            yield Row(reader.line_num, dict(content) if whole else Bad(f"not the {fields} fields of the header"))


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            place = 0
            for batch in file.iter_batches(_BATCH_ROWS):
                for content in batch.to_pylist():
                    place += 1
                    yield Row(place, content)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} can't be read as parquet: {reason}") from error
