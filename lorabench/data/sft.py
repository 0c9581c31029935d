"""SFT datasets in the chat-messages form of Tulu3 and OpenThoughts3: made, split, written, read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config import DatasetSpec, FactsDataset, FileDataset, HubDataset
from lorabench.data.chat import Chat, is_example, prompt
from lorabench.data.facts import SOURCE, random_facts
from lorabench.data.files import file_chats
from lorabench.data.hub import hub_chats
from lorabench.data.reasoning import INSTRUCT_TASKS, mixture, odd, worked_solutions
from lorabench.errors import UserError
from lorabench.records import atomic_path

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMA = pa.schema([("split", pa.string()), ("source", pa.string()), ("messages", pa.list_(_MESSAGE))])


# So many chats in a row that are unfit or known mean that there are no more.
_MAX_MISSES = 500


def chats(spec: DatasetSpec) -> Iterator[Chat]:
    """The chats of the dataset's kind, as many as there are."""
    match spec:
        case HubDataset():
            yield from hub_chats(spec)
        case FileDataset():
            yield from file_chats(spec)
        case FactsDataset():
            yield from random_facts(spec)
        case _:
            problems = (
                mixture(INSTRUCT_TASKS, spec.seed) if spec.kind == "instruct" else worked_solutions(odd, spec.seed)
            )
            for problem in problems:
                yield Chat.of(problem.source, problem.question, problem.response)


def make_dataset(spec: DatasetSpec) -> list[dict[str, Any]]:
    """Rows (split, source, messages), distinct by prompt across all splits; random facts are the same in every split.

    Raises:
        UserError: there are not that many distinct chats of that length.
    """
    source = _distinct(spec)
    if isinstance(spec, FactsDataset):
        facts = _take(source, spec.facts, "facts")
        return [_row(split, fact) for split in SPLITS for fact in facts]
    what = f"of at most {spec.max_chars} characters in a dataset of kind {spec.kind!r}"
    rows = [
        _row(split, chat)
        for split in SPLITS
        for chat in _take(source, getattr(spec, split), f"{split} examples {what}")
    ]
    check_disjoint(rows)
    return rows


def _distinct(spec: DatasetSpec) -> Iterator[Chat]:
    """Chats that are short enough, each prompt once; ends after many in a row that are not."""
    longest = None if isinstance(spec, FactsDataset) else spec.max_chars
    seen: set[str] = set()
    misses = 0
    for chat in chats(spec):
        key = prompt(chat.messages)
        if not is_example(chat.messages) or key in seen or (longest is not None and chat.chars() > longest):
            misses += 1
            if misses > _MAX_MISSES:
                return
            continue
        misses = 0
        seen.add(key)
        yield chat


def _take(source: Iterator[Chat], count: int, what: str) -> list[Chat]:
    """The next `count` chats.

    Raises:
        UserError: there are fewer.
    """
    taken = list(islice(source, count))
    if len(taken) < count:
        raise UserError(f"found no {count} distinct {what}")
    return taken


def _row(split: Split, chat: Chat) -> dict[str, Any]:
    return {"split": split, "source": chat.source, "messages": chat.messages}


def check_disjoint(rows: list[dict[str, Any]]) -> None:
    """Raises UserError, naming the prompt, if two splits share one; random facts are meant to be shared."""
    home: dict[str, str] = {}
    for row in rows:
        if row["source"] == SOURCE:
            continue
        text = prompt(row["messages"])
        if home.setdefault(text, row["split"]) != row["split"]:
            raise UserError(f"splits {home[text]!r} and {row['split']!r} share the example {text[:80]!r}")


def write_dataset(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as parquet, whole or not at all."""
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial)


def read_dataset(path: Path) -> list[dict[str, Any]]:
    """The rows of a dataset file; splits checked to be disjoint."""
    rows: list[dict[str, Any]] = pq.read_table(path, schema=_SCHEMA).to_pylist()
    check_disjoint(rows)
    return rows
