"""Examples and problems from a user's own file: JSONL, JSON, CSV or parquet.

The columns decide what a row is (`lorabench.config.fields.FileFormat`): a chat in `messages` or `conversations`; a
pair, which becomes a chat of two turns (`instruction` together with its `input`, if there is one); or a `text`, trained
as plain text with the end token and without a chat template, every token of it scored. A chat takes precedence over a
pair, a pair over a text.

The file is read row by row. A row that can't be used is counted by its reason (`lorabench.data.rows.Tally`), never
silently dropped; what is wrong with the file as a whole is an error of one sentence.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, get_args

from lorabench.config.fields import FileFormat
from lorabench.config.inputs import FileDataset, FileProblems
from lorabench.data.chat import ROLES, Chat, Messages, is_example, prompt_digest
from lorabench.data.grading import BOX, gsm8k_answer, last_box, number
from lorabench.data.reasoning import Problem
from lorabench.data.rows import TOO_LONG, RawRow, Tally, UnusableRowError, file_rows, usable
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

    problems = [problem for _, problem in usable(file_rows(path, tally), parse, tally, lambda problem: problem.key)]
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
    return usable_rows(file_rows(path, tally), path.name, tally, max_chars)


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
