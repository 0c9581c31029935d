"""Examples and problems from a user's own file: JSONL, JSON, CSV or parquet.

The columns decide what a row is (`lorabench.config.fields.FileFormat`): a chat in `messages` or `conversations`; a
pair, which becomes a chat of two turns (`instruction` together with its `input`, if there is one); or a `text`, trained
as plain text with the end token and without a chat template, every token of it scored. A chat takes precedence over a
pair, a pair over a text.

Whatever comes from outside goes through `usable`, datasets and problem sets of the hub too: a row that can't be used is
counted in a `Tally` by its reason. What is wrong with a file as a whole is a `UserError`.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.fields import FileFormat
from lorabench.config.inputs import FileDataset, FileProblems
from lorabench.data.chat import CHATS, FORMATS, Chat, Example, Messages, is_first, prompt, text_digest
from lorabench.data.grading import BOX, gsm8k_answer, last_box, number
from lorabench.data.reasoning import Problem
from lorabench.errors import UserError

# Examples of reasoning datasets take 50 kB each.
_BATCH_ROWS = 256
NO_TEXT, NO_CHAT, NO_ANSWER = "no text", "not a list of turns", "does not end with an answer of the assistant"
NOT_UNICODE = "text that is not valid Unicode"
NOT_UTF8, NO_OBJECT, NO_NUMBER = "not UTF-8", "not a JSON object", "an answer that is no number"
TOO_LONG, REPEATED = "too long", "repeats the prompt of an earlier row"

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
"""The roles of turns in the datasets of others, with the roles that they stand for."""

RawRow = dict[str, Any] | str
"""A row as it was read: its columns by name, or the reason why it can't be read."""


class UnusableRowError(ValueError):
    """A row's content is not a usable example; the message is the reason."""


@dataclass
class Tally:
    """The number of rows that were read, the number of usable ones, and the reasons why the others were left out.

    Rows are numbered from 1; blank lines are no rows.
    """

    format: str  # What the rows are read as, such as their format.
    rows: int = 0
    usable: int = 0
    bad: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For each reason the number of rows that were left out, and the number of the first of them."""

    def leave_out(self, number: int, reason: str, rows: int = 1) -> None:
        """Count rows that can't be used, the first of which has a number."""
        count, first = self.bad.get(reason, (0, number))
        self.bad[reason] = count + rows, min(first, number)

    def reasons(self) -> str:
        """Return the reasons as text, `3 no text (first: row 7), 1 too long (first: row 9)`; empty if none."""
        most_first = sorted(self.bad.items(), key=lambda item: -item[1][0])
        return ", ".join(f"{count} {reason} (first: row {first})" for reason, (count, first) in most_first)

    def __str__(self) -> str:
        left_out = f"; left out: {self.reasons()}" if self.bad else ""
        return f"{self.usable} of {self.rows} rows can be used as {self.format}{left_out}"

    def plain(self) -> dict[str, Any]:
        """Return the tally as plain data for JSON."""
        bad = [{"reason": reason, "rows": count, "first": first} for reason, (count, first) in self.bad.items()]
        return {"format": self.format, "rows": self.rows, "usable": self.usable, "bad": bad}


def usable(
    rows: Iterable[RawRow],
    parse: Callable[[dict[str, Any]], Example],
    tally: Tally,
    is_new: Callable[[Example], bool] = lambda example: True,
) -> Iterator[tuple[int, Example]]:
    """Yield the number and the example of each usable and new row (see `is_first`); the tally counts all rows.

    The function `parse` turns the columns of a row into an example, or raises UnusableRowError.
    """
    for content in rows:
        tally.rows += 1
        try:
            if isinstance(content, str):
                raise UnusableRowError(content)
            example = parse(content)
            if not is_new(example):
                raise UnusableRowError(REPEATED)
        except UnusableRowError as error:
            tally.leave_out(tally.rows, str(error))
            continue
        tally.usable += 1
        yield tally.rows, example


def json_lines(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file with one JSON object per line; blank lines are skipped."""
    with path.open("rb") as file:
        # Lines of bytes end at line feeds only, not at other line ends that texts contain, such as U+2028.
        for line in file:
            try:
                if text := line.decode("utf-8-sig").strip():
                    value = json.loads(text)
                    yield value if isinstance(value, dict) else NO_OBJECT
            except UnicodeDecodeError:
                yield NOT_UTF8
            except (ValueError, RecursionError):
                yield "not JSON"


def parquet_rows(
    path: Path, choose: Callable[[Collection[str], str], list[str] | None] = lambda columns, name: None
) -> Iterator[RawRow]:
    """Yield the rows of a parquet file, a batch of which is held in memory.

    The function `choose` is given all columns and the file's name, and returns the columns to read, None for all.
    """
    try:
        with pq.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH_ROWS, columns=choose(file.schema_arrow.names, str(path)))
            yield from (row for batch in batches for row in batch.to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} can't be read as parquet: {reason}") from error


def part_rows(
    files: Iterable[Path], name: str, needed: Sequence[Sequence[str]], optional: Sequence[str] = ()
) -> Iterator[RawRow]:
    """Yield the rows of a part of a dataset, of all its files.

    Of the columns, those are read that are `needed`, of several names for one the first that is there, and those of
    the `optional` ones that are there. UserError calls the dataset `name`, and says that a file is of another kind, a
    row can't be read, or a column is missing.
    """

    def choose(columns: Collection[str], where: str) -> list[str]:
        chosen = [column for column in optional if column in columns]
        for names in needed:
            present = [column for column in names if column in columns]
            if not present:
                raise UserError(f"{name} has columns {', '.join(columns)} in {where}; {' or '.join(names)} is needed")
            chosen.append(present[0])
        return chosen

    for file in files:
        if file.suffix not in (".parquet", ".jsonl"):
            raise UserError(f"{file} is neither .parquet nor .jsonl, the kinds of data files that are read")
        rows = parquet_rows(file, choose) if file.suffix == ".parquet" else json_lines(file)
        for place, content in enumerate(rows, 1):
            if isinstance(content, str):
                raise UserError(f"{file}:{place} is {content}")
            yield {column: content[column] for column in choose(content, f"{file}:{place}")}


def file_rows(path: Path) -> Iterator[RawRow]:
    """Yield all rows of a file; UserError says that it can't be read, or has none."""
    readers = {".jsonl": json_lines, ".json": _json_rows, ".csv": _csv_rows, ".parquet": parquet_rows}
    if path.suffix not in readers:
        raise UserError(f"data file {str(path)!r} must end in one of {', '.join(readers)}")
    row = None
    try:
        for row in readers[path.suffix](path):
            yield row
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from error
    if row is None:
        raise UserError(f"{path} has no rows")


def _json_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of an array of objects, held in memory, or of one object per line, as in many .json files."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if not is_array:
        yield from json_lines(path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    yield from (value if isinstance(value, dict) else NO_OBJECT for value in values)


def _csv_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a CSV file with a header."""
    # Python's limit is 128 KiB by default, and holds for the whole process.
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 become lone surrogates, so that their row is unusable and not the whole file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        for content in reader:
            # DictReader puts fields beyond the header under the key None, and None in place of missing fields.
            is_whole = None not in content and None not in content.values()
            yield content if is_whole else f"not the {len(reader.fieldnames or ())} fields of the header"


def chosen_format(path: Path) -> FileFormat:
    """Return the format that the columns of the first row with columns of a format imply; UserError if none does."""

    def formats_of(content: dict[str, Any]) -> list[FileFormat]:
        """Return the formats whose columns are all present: of chats the first, else all pairs, else the text."""
        formats = [name for name in FORMATS if set(name.split("/")) <= content.keys()]
        if not formats:
            raise UnusableRowError("without the columns of a format")
        return [name for name in formats if name in CHATS][:1] or [name for name in formats if "/" in name] or formats

    tally = Tally(f"one of the formats {', '.join(FORMATS)}")
    for _, formats in usable(file_rows(path), formats_of, tally):
        if len(formats) > 1:
            raise UserError(f"{path} may be read as {' or '.join(formats)}; set `format`")
        return formats[0]
    raise UserError(f"{path}: {tally}")


def row_chat(content: dict[str, Any], form: str, source: str, max_chars: int | None, group: str | None) -> Chat:
    """Return the example of a row in one of FORMATS, of at most `max_chars`; UnusableRowError says why it is none."""
    chat = Chat(source_of(source, content, group), file_messages(content, form))
    if max_chars is not None and chat.chars() > max_chars:
        raise UnusableRowError(TOO_LONG)
    return chat


def file_messages(content: dict[str, Any], format_name: str) -> Messages:
    """Return the messages of a row; UnusableRowError says why the row is not an example of that format."""
    if format_name == "text":
        return [{"role": "text", "content": row_text(content.get("text"))}]
    names = format_name.split("/")
    if len(names) == 1:
        messages = chat_turns(content.get(format_name))
    else:
        asked, answered = (content.get(name) for name in names)
        if names[0] == "instruction" and content.get("input"):
            asked = f"{row_text(asked)}\n\n{row_text(content['input'])}"
        messages = []
        # Each side of a pair is a text or a list of turns.
        for value, role in ((asked, "user"), (answered, "assistant")):
            messages += chat_turns(value) if isinstance(value, list) else [{"role": role, "content": row_text(value)}]
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UnusableRowError(NO_ANSWER)
    return messages


def chat_turns(turns: Any) -> Messages:
    """Return turns with `role` and `content`, or `from` and `value`, as messages, whose content may be empty."""
    if not turns:
        raise UnusableRowError(NO_TEXT)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRowError(NO_CHAT)
    messages = []
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise UnusableRowError(f"a turn of unknown role (known: {', '.join(ROLES)})")
        content = turn.get("content") or turn.get("value", turn.get("content"))
        messages.append({"role": ROLES[role], "content": row_text(content, may_be_empty=True)})
    return messages


def row_text(value: Any, may_be_empty: bool = False) -> str:
    """Return a value of a row as text, or a number; UnusableRowError if it is none, empty, or no valid Unicode."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    text = str(value) if is_number else value
    if not isinstance(text, str) or not (may_be_empty or text.strip()):
        raise UnusableRowError(NO_TEXT)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(NOT_UNICODE) from None
    return text


def source_of(source: str, content: dict[str, Any], group: str | None) -> str:
    """Return the source of a row's example, with the row's value in the column `group`, if there is one."""
    if group is None:
        return source
    try:
        return f"{source}/{row_text(content.get(group))}"
    except UnusableRowError:
        raise UnusableRowError(f"no {group!r}, which names its group") from None


def usable_chats(
    rows: Iterable[RawRow], source: str, tally: Tally, max_chars: int | None = None, group: str | None = None
) -> Iterator[tuple[int, Chat]]:
    """Yield the usable examples among rows in the tally's format, each prompt once, with the numbers of their rows."""
    # Hashes take less memory than prompts.
    is_new: Callable[[Chat], bool] = is_first(lambda chat: text_digest(prompt(chat.messages)))
    return usable(rows, lambda content: row_chat(content, tally.format, source, max_chars, group), tally, is_new)


def file_chats(spec: FileDataset) -> tuple[list[Chat], Tally]:
    """Return the usable examples of a dataset's file in an order that the seed decides, and the tally of its rows."""
    path = Path(spec.path)
    tally = Tally(spec.format or chosen_format(path))
    chats = [chat for _, chat in usable_chats(file_rows(path), path.name, tally, spec.max_chars, spec.group)]
    return _shuffled(chats, tally, spec), tally


def file_problems(spec: FileProblems) -> tuple[list[Problem], Tally]:
    """Return the usable problems of a file, each question once, in an order that the seed decides, and the tally."""
    path, tally = Path(spec.path), Tally("question/answer")

    def parse(content: dict[str, Any]) -> Problem:
        question, answer = (row_text(content.get(name)).strip() for name in ("question", "answer"))
        if len(question) > spec.max_chars:
            raise UnusableRowError(TOO_LONG)
        short = last_box(answer) or gsm8k_answer(answer) or answer
        if spec.grader == "number" and number(short) is None:
            raise UnusableRowError(NO_NUMBER)
        asks_for_box = spec.grader == "number" or "\\boxed" in question
        return Problem(source_of(path.name, content, spec.group), question if asks_for_box else question + BOX, short)

    is_new: Callable[[Problem], bool] = is_first(lambda problem: problem.key)
    problems = [problem for _, problem in usable(file_rows(path), parse, tally, is_new)]
    return _shuffled(problems, tally, spec), tally


def _shuffled(examples: list[Example], tally: Tally, spec: FileDataset | FileProblems) -> list[Example]:
    """Return examples in an order that the seed decides; UserError if there are too few."""
    needed = spec.train + spec.validation + spec.test
    if len(examples) < needed:
        raise UserError(f"{spec.path}: {tally}; {needed} are needed for train, validation and test")
    Random(spec.seed).shuffle(examples)
    return examples
