"""Problem sets for RL, questions with answers that a grader can verify: making, splitting, writing and reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.datasets import FileProblems, HubProblems, ProblemSpec, ReasoningProblems, SumProblems
from lorabench.data.answers import number
from lorabench.data.chat import SPLITS, Split
from lorabench.data.files import file_problems
from lorabench.data.hub_problems import hub_pools
from lorabench.data.reasoning import Problem, interleaved, is_worked_template, task_problems, worked_solutions
from lorabench.data.sums import sum_problems
from lorabench.errors import UserError
from lorabench.utils.files import atomic_path, read_parquet
from lorabench.utils.hub import FetchedRepository

_SCHEMA = pa.schema([(name, pa.string()) for name in ("split", "source", "question", "answer")])

# This many consecutive problems that are too long or repeated mean that there are no more.
_MAX_MISSES = 500


def make_problems(
    spec: ProblemSpec, fetched: Mapping[str, FetchedRepository] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Return the rows of a problem set (split, source, question, answer), distinct by question across all splits.

    Args:
        spec: the problem set.
        fetched: the repositories of a problem set of the hub, by id.

    Raises:
        UserError: there are fewer distinct problems than the splits need, or the files can't be read.
    """
    train, test = _pools(spec, fetched)
    seen: set[str] = set()
    # Held-out splits are drawn first, so that those of the hub do not depend on the number of training problems.
    pools: dict[Split, Iterator[Problem]] = {"test": test, "validation": train, "train": train}
    taken = {
        split: _take(_distinct(pool, seen), getattr(spec, split), f"{split} problems of kind {spec.kind!r}")
        for split, pool in pools.items()
    }
    return [
        {"split": split, "source": problem.source, "question": problem.question, "answer": problem.answer}
        for split in SPLITS
        for problem in taken[split]
    ]


def _pools(spec: ProblemSpec, fetched: Mapping[str, FetchedRepository]) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Return the problems to train on and to test on; the same iterator where the set has no test split."""
    match spec:
        case HubProblems():
            return hub_pools(spec, fetched)
        case FileProblems():
            pool = iter(file_problems(spec)[0])
        case SumProblems():
            pool = sum_problems(spec.min_digits, spec.max_digits, spec.carries, spec.seed)
        case _:
            pool = _reasoning_pool(spec)
    return pool, pool


def _reasoning_pool(spec: ReasoningProblems) -> Iterator[Problem]:
    """Return distinct problems in random order: as many as the splits need, or fewer if the tasks have no more.

    Easy problems repeat soon, so problems that come late are harder, and must not make up a split of their own.
    """
    count = spec.train + spec.validation + spec.test
    pool = list(islice(_distinct(_suitable(_generated(spec), spec.max_chars), set()), count))
    Random(spec.seed).shuffle(pool)
    return iter(pool)


def _generated(spec: ReasoningProblems) -> Iterator[Problem]:
    """Yield problems of the set's kind without end."""
    if spec.kind == "gsm_symbolic":
        return worked_solutions(is_worked_template, spec.seed)
    return interleaved([task_problems(task, spec.seed, **_settings(task, spec)) for task in spec.tasks], spec.seed)


def _settings(task: str, spec: ReasoningProblems) -> dict[str, int]:
    """Return the set's sizes under the names that they have in a task of reasoning-gym."""
    match task:
        case "chain_sum" | "products":
            return {name: getattr(spec, name) for name in ("min_digits", "max_digits", "min_terms", "max_terms")}
        case "gcd" | "lcm":
            return {"min_numbers": spec.min_terms, "max_numbers": spec.max_terms, "max_value": spec.max_value}
        case _:
            return {}


def _suitable(problems: Iterator[Problem], max_chars: int) -> Iterator[Problem]:
    """Yield the problems that are short enough and have a number as answer; end after many others in a row."""
    misses = 0
    for problem in problems:
        if len(problem.question) + len(problem.response) <= max_chars and number(problem.answer) is not None:
            misses = 0
            yield problem
        elif (misses := misses + 1) > _MAX_MISSES:
            return


def _distinct(problems: Iterator[Problem], seen: set[str]) -> Iterator[Problem]:
    """Yield the problems whose question is not yet in `seen`, and add it; end after many repeated ones in a row."""
    misses = 0
    for problem in problems:
        if problem.key not in seen:
            misses = 0
            seen.add(problem.key)
            yield problem
        elif (misses := misses + 1) > _MAX_MISSES:
            return


def _take(source: Iterator[Problem], count: int, what: str) -> list[Problem]:
    """Return the next `count` problems.

    Raises:
        UserError: there are fewer.
    """
    taken = list(islice(source, count))
    if len(taken) < count:
        raise UserError(f"found {len(taken)} distinct {what}; {count} are needed")
    return taken


def check_disjoint_problems(rows: list[dict[str, Any]]) -> None:
    """Raise UserError, naming the question, if two splits share a question."""
    split_of: dict[str, str] = {}
    for row in rows:
        text = " ".join(row["question"].split())
        if split_of.setdefault(text, row["split"]) != row["split"]:
            raise UserError(f"splits {split_of[text]!r} and {row['split']!r} share the problem {text[:80]!r}")


def write_problems(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as parquet; the file appears only once it is complete."""
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial)


def read_problems(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a problem file.

    Raises:
        UserError: the file is missing or damaged, or two splits share a question.
    """
    rows: list[dict[str, Any]] = read_parquet(path, _SCHEMA).to_pylist()
    check_disjoint_problems(rows)
    return rows
