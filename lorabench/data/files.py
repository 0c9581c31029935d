"""Examples and problems from a user's own file: JSONL, JSON, CSV or parquet.

The columns decide what a row is (`lorabench.config.fields.FileFormat`): a chat in `messages` or `conversations`; a
pair, which becomes a chat of two turns (`instruction` together with its `input`, if there is one); or a `text`, trained
as plain text with the end token and without a chat template, every token of it scored. A chat takes precedence over a
pair, a pair over a text.

The file is read row by row. A row that can't be used is counted by its reason (`lorabench.data.rows.Tally`), never
silently dropped; what is wrong with the file as a whole is an error of one sentence.
"""

from __future__ import annotations

import codecs
import csv
import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, get_args

from lorabench.config.datasets import FileDataset, FileProblems
from lorabench.config.fields import FILE_SUFFIXES, FileFormat
from lorabench.data.answers import gsm8k_answer, last_box, number
from lorabench.data.chat import Chat, Messages, is_example, prompt_digest
from lorabench.data.hub import ROLES
from lorabench.data.hub_problems import BOX
from lorabench.data.reasoning import Problem
from lorabench.data.rows import (
    MAX_LINE_BYTES,
    TOO_LONG,
    RawRow,
    Tally,
    Unreadable,
    UnusableRowError,
    json_lines,
    parquet_rows,
    text_lines,
    usable,
)
from lorabench.errors import UserError

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)

NO_TEXT, NO_CHAT, NO_ASSISTANT = "no text", "not a list of turns", "does not end with a turn of the assistant"
NOT_UNICODE, NO_NUMBER = "text that is not valid Unicode", "an answer that is no number"


def file_chats(spec: FileDataset) -> Iterator[Chat]:
    """Yield the usable examples of a file, each prompt once, in an order that the seed decides.

    The examples wait in a temporary file until their turn, so that memory holds one of them at a time.

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
    """Return the usable problems of a file, each question once, in an order that the seed decides, and the tally.

    Raises:
        UserError: the file can't be read, lacks a column, or has too few usable rows.
    """
    path, tally = Path(spec.path), Tally(f"{spec.question}/{spec.answer}")

    def parse(content: dict[str, Any]) -> Problem:
        return _problem(content, spec, path.name)

    problems = [problem for _, problem in usable(_rows(path, tally), parse, tally, lambda problem: problem.key)]
    missing = [name for name in (spec.question, spec.answer) if name not in tally.columns]
    if tally.columns and missing and not problems:
        raise UserError(f"{path} has the columns {_names(tally.columns)}; {_names(missing)} is needed")
    _check_enough(path, tally, spec)
    Random(spec.seed).shuffle(problems)
    return problems, tally


def tally_of(spec: FileDataset | FileProblems) -> Tally:
    """Return the tally of a dataset's file, which is read once through.

    Raises:
        UserError: the file can't be read or lacks a column, or a problem set has too few usable rows.
    """
    if isinstance(spec, FileProblems):
        return file_problems(spec)[1]
    path = Path(spec.path)
    tally = Tally(chosen_format(path, spec.format))
    for _ in usable_chats(path, tally, spec.max_chars):
        pass
    return tally


def usable_chats(path: Path, tally: Tally, max_chars: int | None = None) -> Iterator[Chat]:
    """Yield the usable examples in the order of the file, each prompt once.

    Args:
        path: the file.
        tally: says the format; the rows are counted here as they are read.
        max_chars: longer examples are left out; None for no limit.

    Raises:
        UserError: the file can't be read.
    """
    return usable_rows(_rows(path, tally), path.name, tally, max_chars)


def usable_rows(rows: Iterable[RawRow], source: str, tally: Tally, max_chars: int | None) -> Iterator[Chat]:
    """Yield the usable examples among rows that were read elsewhere; see `usable_chats`."""

    def parse(content: dict[str, Any]) -> Chat:
        chat = Chat(source, file_messages(content, tally.format))
        if max_chars is not None and chat.chars() > max_chars:
            raise UnusableRowError(TOO_LONG)
        return chat

    # Hashes take less memory than prompts.
    return (chat for _, chat in usable(rows, parse, tally, lambda chat: prompt_digest(chat.messages)))


def chosen_format(path: Path, wanted: FileFormat | None = None) -> FileFormat:
    """Return the wanted format, else the format that the columns of the first row with columns of a format imply.

    Raises:
        UserError: the columns imply no format or several, or the file can't be read.
    """
    if wanted is not None:
        return wanted
    tally = Tally("unknown")
    for _, formats in usable(_rows(path, tally), formats_in, tally):
        if len(formats) > 1:
            raise UserError(f"{path} may be read as {' or '.join(formats)}; set `format`")
        if formats:
            return formats[0]
    if not tally.columns and tally.bad:
        raise UserError(f"{path}: none of its {tally.rows} rows can be used: {tally.reasons()}")
    raise UserError(
        f"{path} has the columns {_names(tally.columns)}; needed are those of one format: {', '.join(FORMATS)}"
    )


def formats_in(columns: Iterable[str]) -> list[FileFormat]:
    """Return the formats whose columns are all present: of chats the first, else all pairs, else the text."""
    present = set(columns)
    formats = [name for name in FORMATS if present.issuperset(name.split("/"))]
    chats: list[FileFormat] = [name for name in formats if name in ("messages", "conversations")]
    return chats[:1] or [name for name in formats if "/" in name] or formats


def file_messages(content: dict[str, Any], format_name: str) -> Messages:
    """Return the messages of a row, each with `role` and `content`.

    Raises:
        UnusableRowError: the row is not an example of that format.
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
        raise UnusableRowError(NO_ASSISTANT)
    return messages


def _side(value: Any, role: str) -> Messages:
    """Return the messages of one side of a pair, which is a text or a list of turns."""
    return _turns(value) if isinstance(value, list) else [{"role": role, "content": _text(value)}]


def _turns(value: Any) -> Messages:
    if not value:
        raise UnusableRowError(NO_TEXT)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UnusableRowError(NO_CHAT)
    messages = []
    for turn in value:
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise UnusableRowError(f"a turn of unknown role (known: {', '.join(ROLES)})")
        content = turn.get("content") or turn.get("value")
        # Many datasets have an empty system prompt.
        if ROLES[role] != "system" or content:
            messages.append({"role": ROLES[role], "content": _text(content)})
    return messages


def _text(value: Any) -> str:
    """Return a value as text; a number is converted, since JSON and parquet hold answers as numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    text = str(value) if is_number else value
    if not isinstance(text, str) or not text.strip():
        raise UnusableRowError(NO_TEXT)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(NOT_UNICODE) from None
    return text


def _problem(content: dict[str, Any], spec: FileProblems, source: str) -> Problem:
    question, answer = _text(content.get(spec.question)).strip(), _text(content.get(spec.answer)).strip()
    if len(question) > spec.max_chars:
        raise UnusableRowError(TOO_LONG)
    short = last_box(answer) or gsm8k_answer(answer) or answer
    if spec.grader == "number":
        if number(short) is None:
            raise UnusableRowError(NO_NUMBER)
        return Problem(source, question, short)
    return Problem(source, question if "\\boxed" in question else question + BOX, short)


def _check_enough(path: Path, tally: Tally, spec: FileDataset | FileProblems) -> None:
    wanted = spec.train + spec.validation + spec.test
    if tally.usable >= wanted:
        return
    why = f" ({tally.reasons()})" if tally.bad else ""
    raise UserError(
        f"{path}, read as {tally.format}: {tally.usable} of its {tally.rows} rows can be used{why}; {wanted} are "
        f"needed: train = {spec.train}, validation = {spec.validation}, test = {spec.test}"
    )


def _names(columns: Iterable[str]) -> str:
    # The names are quoted, since a file may hold anything.
    return ", ".join(repr(name)[:80] for name in list(columns)[:20]) or "none"


def _rows(path: Path, tally: Tally) -> Iterator[RawRow]:
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
