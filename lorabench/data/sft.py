"""SFT datasets in the chat-messages form of Tulu3 and OpenThoughts3: made, split, written, read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config import ChatDataset, DatasetSpec, FactsDataset
from lorabench.data.facts import SOURCE, random_facts
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


def problems(spec: ChatDataset) -> Iterator[Problem]:
    """Endless problems of the dataset's kind."""
    match spec.kind:
        case "instruct":
            return mixture(INSTRUCT_TASKS, spec.seed)
        case "worked":
            return worked_solutions(odd, spec.seed)


def make_dataset(spec: DatasetSpec) -> list[dict[str, Any]]:
    """Rows (split, source, messages), distinct by prompt across all splits; random facts are the same in every split.

    Raises:
        UserError: the generator does not have that many distinct problems of that length.
    """
    if isinstance(spec, FactsDataset):
        facts = _distinct(random_facts(spec), spec.facts, set(), lambda fact: True, "facts")
        return [_row(split, fact) for split in SPLITS for fact in facts]
    source = problems(spec)
    seen: set[str] = set()

    def short(problem: Problem) -> bool:
        return len(problem.question) + len(problem.response) <= spec.max_chars

    rows = [
        _row(split, problem)
        for split in SPLITS
        for problem in _distinct(
            source,
            getattr(spec, split),
            seen,
            short,
            f"{split} examples of at most {spec.max_chars} characters of kind {spec.kind!r}",
        )
    ]
    check_disjoint(rows)
    return rows


def _distinct(
    source: Iterator[Problem], count: int, seen: set[str], wanted: Callable[[Problem], bool], what: str
) -> list[Problem]:
    """The next `count` problems that are wanted and whose question is not in `seen`, which grows."""
    found: list[Problem] = []
    misses = 0
    while len(found) < count:
        problem = next(source)
        if problem.question in seen or not wanted(problem):
            misses += 1
            if misses > _MAX_MISSES:
                raise UserError(f"found no {count} distinct {what}")
            continue
        misses = 0
        seen.add(problem.question)
        found.append(problem)
    return found


def _row(split: Split, problem: Problem) -> dict[str, Any]:
    messages = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.response}]
    return {"split": split, "source": problem.source, "messages": messages}


def prompt(messages: Messages) -> str:
    """All that comes before the last assistant turn, normalised: what makes two examples the same."""
    return "\n".join(" ".join(m["content"].split()) for m in messages[:-1])


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
