"""SFT datasets in the chat-messages form of Tulu3 and OpenThoughts3: made, split, written, read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config import DatasetSpec
from lorabench.data.reasoning import INSTRUCT_TASKS, Problem, mixture, odd, worked_solutions
from lorabench.errors import UserError
from lorabench.records import atomic_path

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Messages = list[dict[str, str]]

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_SCHEMA = pa.schema([("split", pa.string()), ("source", pa.string()), ("messages", pa.list_(_MESSAGE))])


# So many problems in a row that are too long or known mean that there are no more.
_MAX_MISSES = 500


def problems(spec: DatasetSpec) -> Iterator[Problem]:
    """Endless problems of the dataset's kind."""
    match spec.kind:
        case "instruct":
            return mixture(INSTRUCT_TASKS, spec.seed)
        case "worked":
            return worked_solutions(odd, spec.seed)


def make_dataset(spec: DatasetSpec) -> list[dict[str, Any]]:
    """Rows (split, source, messages), distinct by prompt across all splits.

    Raises:
        UserError: the generator does not have that many distinct problems of that length.
    """
    wanted = [(split, getattr(spec, split)) for split in SPLITS]
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    source = problems(spec)
    for split, count in wanted:
        misses = 0
        while count:
            problem = next(source)
            if problem.question in seen or len(problem.question) + len(problem.response) > spec.max_chars:
                misses += 1
                if misses > _MAX_MISSES:
                    raise UserError(
                        f"dataset kind {spec.kind!r}: found no {getattr(spec, split)} distinct {split} examples of at "
                        f"most {spec.max_chars} characters"
                    )
                continue
            misses = 0
            seen.add(problem.question)
            rows.append(
                {
                    "split": split,
                    "source": problem.source,
                    "messages": [
                        {"role": "user", "content": problem.question},
                        {"role": "assistant", "content": problem.response},
                    ],
                }
            )
            count -= 1
    check_disjoint(rows)
    return rows


def prompt(messages: Messages) -> str:
    """All that comes before the last assistant turn, normalised: what makes two examples the same."""
    return "\n".join(" ".join(m["content"].split()) for m in messages[:-1])


def check_disjoint(rows: list[dict[str, Any]]) -> None:
    """Raises UserError, naming the prompt, if two splits share one."""
    home: dict[str, str] = {}
    for row in rows:
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
