"""SFT datasets in the form of Tulu3 (chat messages): making, splitting, writing and reading them, row by row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from string import ascii_lowercase
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import ChatDataset, DatasetSpec, DocstringsDataset, FactsDataset, FileDataset, HubDataset
from lorabench.data.chat import SPLITS, Chat, Split, is_first, prompt, prompt_digest, take, wanted
from lorabench.data.docstrings import choose_docstrings
from lorabench.data.files import file_chats
from lorabench.data.hub import choose_chats
from lorabench.data.reasoning import INSTRUCT_TASKS, is_worked_template, mixture, worked_solutions
from lorabench.errors import UserError
from lorabench.utils.files import atomic_path, damage_explained
from lorabench.utils.hub import FetchedRepository

ExampleRow = dict[str, Any]
"""An example of a dataset file: `split`, `source` and `messages`."""

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMA = pa.schema([("split", pa.string()), ("source", pa.string()), ("messages", pa.list_(_MESSAGE))])
_ABOUT = b"lorabench"

# Limits of a row group, which is held in memory, in examples and in characters; the last example may exceed the latter.
_GROUP_ROWS = 4096
_GROUP_CHARS = 16_000_000

# Rows of a batch that is read.
_BATCH_ROWS = 256

# Random facts: their source, and the number of letters of a name.
_FACTS, _NAME_LENGTH = "facts", 6


def build_dataset(
    spec: DatasetSpec, path: Path, fetched: Mapping[str, FetchedRepository] = MappingProxyType({})
) -> None:
    """Make a dataset and write it, from the hub or docstrings with a note of what was left out and why (see `about`).

    Args:
        spec: the dataset.
        path: the parquet file to write.
        fetched: the repository of a dataset of the hub, by id.

    Raises:
        UserError: there are fewer usable and distinct chats than the splits need, or the files can't be read.
    """
    if isinstance(spec, HubDataset | DocstringsDataset):
        chosen, note = choose_chats(spec, fetched) if isinstance(spec, HubDataset) else choose_docstrings(spec)
        write_dataset((_row(split, chat) for split, chat in chosen), path, note)
    else:
        write_dataset(make_dataset(spec), path)


def make_dataset(spec: ChatDataset | FactsDataset | FileDataset) -> Iterator[ExampleRow]:
    """Yield the rows of a generated dataset or a file, distinct by prompt across all splits.

    Random facts are the exception: all splits hold the same facts, since validation measures what was stored.

    Raises:
        UserError: there are fewer usable and distinct chats than the splits need.
    """
    is_new = is_first(_digest)
    if isinstance(spec, FactsDataset):
        facts = list(take(wanted(random_facts(spec), is_new), spec.facts, "facts"))
        for split in SPLITS:
            yield from (_row(split, fact) for fact in facts)
        return
    if isinstance(spec, FileDataset):
        chats = file_chats(spec)
    else:
        instruct = spec.kind == "instruct"
        problems = mixture(INSTRUCT_TASKS, spec.seed) if instruct else worked_solutions(is_worked_template, spec.seed)
        made = (Chat.of(problem.source, problem.question, problem.response) for problem in problems)
        chats = wanted(made, lambda chat: chat.chars() <= spec.max_chars and is_new(chat))
    what = f"of at most {spec.max_chars} characters in a dataset of kind {spec.kind!r}"
    for split in SPLITS:
        for chat in take(chats, getattr(spec, split), f"{split} examples {what}"):
            yield _row(split, chat)


def _digest(chat: Chat) -> int:
    return prompt_digest(chat.messages)


def random_facts(spec: FactsDataset) -> Iterator[Chat]:
    """Yield facts without end: a random name and a number of `spec.digits` digits, all uniform and independent.

    They do not generalize, so a model predicts only what it has stored.
    """
    rng = Random(spec.seed)
    while True:
        name = "".join(rng.choices(ascii_lowercase, k=_NAME_LENGTH))
        number = "".join(rng.choices("0123456789", k=spec.digits))
        yield Chat.of(_FACTS, f"number of {name}?", number)


def _row(split: Split, chat: Chat) -> ExampleRow:
    return {"split": split, "source": chat.source, "messages": chat.messages}


def checked_disjoint(rows: Iterable[ExampleRow]) -> Iterator[ExampleRow]:
    """Yield the same rows; raise UserError, naming the prompt, if two splits share it. Random facts may be shared."""
    split_of: dict[int, Split] = {}
    for row in rows:
        if row["source"] != _FACTS:
            first = split_of.setdefault(prompt_digest(row["messages"]), row["split"])
            if first != row["split"]:
                text = prompt(row["messages"])[:80]
                raise UserError(f"splits {first!r} and {row['split']!r} share the example {text!r}")
        yield row


def write_dataset(rows: Iterable[ExampleRow], path: Path, about: dict[str, Any] | None = None) -> None:
    """Write rows as parquet, a row group at a time; the file appears only once it is complete.

    Args:
        rows: the rows, in the order of the file.
        path: the file to write.
        about: a note for the function `about`, as plain JSON data.
    """
    schema = _SCHEMA if about is None else _SCHEMA.with_metadata({_ABOUT: json.dumps(about)})
    with atomic_path(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        group: list[ExampleRow] = []
        chars = 0
        for row in rows:
            group.append(row)
            chars += sum(len(message["content"]) for message in row["messages"])
            if len(group) == _GROUP_ROWS or chars >= _GROUP_CHARS:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, chars = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def read_dataset(path: Path) -> Iterator[ExampleRow]:
    """Yield the rows of a dataset file.

    Raises:
        UserError: the file is missing or damaged, or two splits share an example.
    """
    with damage_explained(path), pq.ParquetFile(path) as file:
        yield from checked_disjoint(row for batch in file.iter_batches(_BATCH_ROWS) for row in batch.to_pylist())


def about(path: Path) -> dict[str, Any] | None:
    """Return the note in a dataset file; None if it has none, as datasets that are generated or from a file.

    The note has the dataset's `id`, its number of `rows` and of `usable` rows, and under `left_out` the number of rows
    for each reason; on the hub also its `commit`, from docstrings the `licences` of the packages.
    """
    note = (pq.read_schema(path).metadata or {}).get(_ABOUT)
    return None if note is None else json.loads(note)
