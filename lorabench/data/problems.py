"""Problem sets for RL: questions with answers that a grader can tell, made, split, written, read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config import HubProblems, ProblemSpec, ReasoningProblems
from lorabench.data.answers import number
from lorabench.data.chat import SPLITS, Split
from lorabench.data.hub_problems import hub_pools
from lorabench.data.reasoning import Problem, drawn, odd, task_problems, worked_solutions
from lorabench.errors import UserError
from lorabench.hub import Fetched
from lorabench.records import atomic_path, read_parquet

_SCHEMA = pa.schema([(name, pa.string()) for name in ("split", "source", "question", "answer")])

# So many problems in a row that are unfit or known mean that there are no more.
_MAX_MISSES = 500


def make_problems(spec: ProblemSpec, fetched: Mapping[str, Fetched] = MappingProxyType({})) -> list[dict[str, Any]]:
    """Rows (split, source, question, answer), distinct by question across all splits.

    Args:
        fetched: the repositories of a set of the hub, by id.

    Raises:
        UserError: there are not that many distinct problems, or they are not there.
    """
    train, test = hub_pools(spec, fetched) if isinstance(spec, HubProblems) else (pool := _reasoning_pool(spec), pool)
    seen: set[str] = set()
    # What is held out is taken first, so that on the hub it does not depend on how much is trained on.
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


def _reasoning_pool(spec: ReasoningProblems) -> Iterator[Problem]:
    """As many distinct problems as are asked for, or as there are.

    In a random order: easy problems repeat soon, so that what comes late is harder, and must not be one split.
    """
    count = spec.train + spec.validation + spec.test
    pool = list(islice(_distinct(_fit(_made(spec), spec.max_chars), set()), count))
    Random(spec.seed).shuffle(pool)
    return iter(pool)


def _made(spec: ReasoningProblems) -> Iterator[Problem]:
    """Endless problems of the set's kind."""
    if spec.kind == "gsm_symbolic":
        return worked_solutions(odd, spec.seed)
    return drawn([task_problems(task, spec.seed, **_settings(task, spec)) for task in spec.tasks], spec.seed)


def _settings(task: str, spec: ReasoningProblems) -> dict[str, int]:
    """The set's sizes under the names that reasoning-gym has for them in a task."""
    match task:
        case "chain_sum" | "products":
            return {name: getattr(spec, name) for name in ("min_digits", "max_digits", "min_terms", "max_terms")}
        case "gcd" | "lcm":
            return {"min_numbers": spec.min_terms, "max_numbers": spec.max_terms, "max_value": spec.max_value}
        case _:
            return {}


def _fit(problems: Iterator[Problem], max_chars: int) -> Iterator[Problem]:
    """Problems that are short enough, with a number as their answer; ends after many in a row that are not."""
    misses = 0
    for problem in problems:
        if len(problem.question) + len(problem.response) <= max_chars and number(problem.answer) is not None:
            misses = 0
            yield problem
        elif (misses := misses + 1) > _MAX_MISSES:
            return


def _distinct(problems: Iterator[Problem], seen: set[str]) -> Iterator[Problem]:
    """Problems whose question is not seen yet; ends after many in a row that are."""
    misses = 0
    for problem in problems:
        if problem.key not in seen:
            misses = 0
            seen.add(problem.key)
            yield problem
        elif (misses := misses + 1) > _MAX_MISSES:
            return


def _take(source: Iterator[Problem], count: int, what: str) -> list[Problem]:
    """The next `count` problems.

    Raises:
        UserError: there are fewer.
    """
    taken = list(islice(source, count))
    if len(taken) < count:
        raise UserError(f"found {len(taken)} distinct {what}; {count} are asked for")
    return taken


def check_disjoint(rows: list[dict[str, Any]]) -> None:
    """Raises UserError, naming the question, if two splits share one."""
    home: dict[str, str] = {}
    for row in rows:
        text = " ".join(row["question"].split())
        if home.setdefault(text, row["split"]) != row["split"]:
            raise UserError(f"splits {home[text]!r} and {row['split']!r} share the problem {text[:80]!r}")


def write_problems(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as parquet, whole or not at all."""
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial)


def read_problems(path: Path) -> list[dict[str, Any]]:
    """The rows of a problem file; splits checked to be disjoint."""
    rows: list[dict[str, Any]] = read_parquet(path, _SCHEMA).to_pylist()
    check_disjoint(rows)
    return rows
