"""Problem sets for RL, questions with answers that a grader can verify: making, splitting, writing and reading them.

Those of the Hugging Face hub, or copies of them, are GSM8K, MATH, DeepMath, AIME 2024 and 2025. Each of their questions
ends with a request for a boxed answer, in the words of the Tinker cookbook. GSM8K has train and test splits; of MATH,
as in the cookbook, MATH-500 is the test split and everything else is trained on; DeepMath has a train split only, AIME
a test split only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import FileProblems, HubProblems, ProblemSpec, ReasoningProblems, SumProblems
from lorabench.data.chat import SPLITS, Split, is_first, take, wanted
from lorabench.data.files import file_problems
from lorabench.data.grading import BOX, NUMBER_BOX, gsm8k_answer, last_box, number
from lorabench.data.hub import part_files, part_rows
from lorabench.data.reasoning import Problem, interleaved, is_worked_template, task_problems, worked_solutions
from lorabench.data.rows import Tally, UnusableRowError, usable
from lorabench.data.sums import sum_problems
from lorabench.errors import UserError
from lorabench.utils.files import atomic_path, read_parquet
from lorabench.utils.hub import FetchedRepository, WantedRepository

_SCHEMA = pa.schema([(name, pa.string()) for name in ("split", "source", "question", "answer")])

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


class _Part(NamedTuple):
    """A split of a repository with problems of a set: its place in the repository, and how to read question and answer.

    Attributes:
        question: the column of the question.
        answer: the column of the answer.
        gold: extracts the short answer from the answer's text; None if there is none.
    """

    id: str
    config: str | None
    split: str
    question: str
    answer: str
    gold: Callable[[str], str | None] = str.strip


_TRAIN = {
    "gsm8k": [_Part("openai/gsm8k", "main", "train", "question", "answer", gsm8k_answer)],
    "math": [
        _Part("EleutherAI/hendrycks_math", subject, split, "problem", "solution", last_box)
        for subject in _SUBJECTS
        for split in ("train", "test")
    ],
    "deepmath": [_Part("zwhe99/DeepMath-103K", None, "train", "question", "final_answer")],
}
_TEST = {
    "gsm8k": [_Part("openai/gsm8k", "main", "test", "question", "answer", gsm8k_answer)],
    "math": [_Part("HuggingFaceH4/MATH-500", None, "test", "problem", "answer")],
    "aime24": [_Part("HuggingFaceH4/aime_2024", None, "train", "problem", "answer")],
    "aime25": [_Part("math-ai/aime25", None, "test", "problem", "answer")],
}


def repositories(spec: HubProblems) -> list[WantedRepository]:
    """Return the repositories to fetch for a problem set."""
    parts: dict[str, list[tuple[str | None, str]]] = {}
    for part in (*_TRAIN.get(spec.kind, ()), *_TEST.get(spec.kind, ())):
        parts.setdefault(part.id, []).append((part.config, part.split))
    return [
        WantedRepository("dataset", name, spec.revisions.get(name, "main"), tuple(splits))
        for name, splits in parts.items()
    ]


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
    is_new = is_first(_key)
    # Held-out splits are drawn first, so that those of the hub do not depend on the number of training problems.
    pools: dict[Split, Iterator[Problem]] = {"test": test, "validation": train, "train": train}
    taken = {
        split: list(take(wanted(pool, is_new), getattr(spec, split), f"{split} problems of kind {spec.kind!r}"))
        for split, pool in pools.items()
    }
    return [
        {"split": split, "source": problem.source, "question": problem.question, "answer": problem.answer}
        for split in SPLITS
        for problem in taken[split]
    ]


def _key(problem: Problem) -> str:
    return problem.key


def _pools(spec: ProblemSpec, fetched: Mapping[str, FetchedRepository]) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Return the problems to train on and to test on; the same iterator where the set has no test split."""
    match spec:
        case HubProblems():
            return _hub_pools(spec, fetched)
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
    if spec.kind == "gsm_symbolic":
        generated = worked_solutions(is_worked_template, spec.seed)
    else:
        tasks = [task_problems(task, spec.seed, **_settings(task, spec)) for task in spec.tasks]
        generated = interleaved(tasks, spec.seed)

    def is_suitable(problem: Problem) -> bool:
        chars = len(problem.question) + len(problem.response)
        return chars <= spec.max_chars and number(problem.answer) is not None

    distinct = wanted(wanted(generated, is_suitable), is_first(_key))
    pool = list(islice(distinct, spec.train + spec.validation + spec.test))
    Random(spec.seed).shuffle(pool)
    return iter(pool)


def _settings(task: str, spec: ReasoningProblems) -> dict[str, int]:
    """Return the set's sizes under the names that they have in a task of reasoning-gym."""
    match task:
        case "chain_sum" | "products":
            return {name: getattr(spec, name) for name in ("min_digits", "max_digits", "min_terms", "max_terms")}
        case "gcd" | "lcm":
            return {"min_numbers": spec.min_terms, "max_numbers": spec.max_terms, "max_value": spec.max_value}
        case _:
            return {}


def _hub_pools(
    spec: HubProblems, fetched: Mapping[str, FetchedRepository]
) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Return the problems to train on and the problems to test on, in an order that the seed decides.

    For DeepMath, which has no test split, both are the same iterator. Problems without an answer are left out, and
    their number is logged.

    Raises:
        UserError: the files do not exist, or can't be read.
    """
    train, test = (
        [problem for part in parts.get(spec.kind, []) for problem in _hub_problems(spec, fetched, part)]
        for parts in (_TRAIN, _TEST)
    )
    for pool in (train, test):
        Random(spec.seed).shuffle(pool)
    if spec.kind not in _TEST:
        everything = iter(train)
        return everything, everything
    # MATH-500 is a part of Hendrycks' MATH.
    tested = {problem.key for problem in test}
    return (problem for problem in train if problem.key not in tested), iter(test)


def _hub_problems(spec: HubProblems, fetched: Mapping[str, FetchedRepository], part: _Part) -> list[Problem]:
    suffix = NUMBER_BOX if spec.kind == "gsm8k" else BOX
    source = "/".join(name for name in (part.id, part.config) if name)

    def columns(names: Collection[str], where: str) -> list[str]:
        # DeepMath also has three long solutions of each problem.
        for name in (part.question, part.answer):
            if name not in names:
                raise UserError(f"{part.id} has the columns {', '.join(names)} in {where}; {name} is needed")
        return [part.question, part.answer]

    def parse(content: dict[str, Any]) -> Problem:
        question, text = content[part.question], content[part.answer]
        answer = None if text is None else part.gold(str(text))
        if not question or not answer:
            raise UnusableRowError("without an answer")
        return Problem(source, question.strip() + suffix, answer)

    tally = Tally("problems", unit="row")
    rows = part_rows(part_files(fetched, spec.path, part.id, part.config, part.split), columns)
    problems = [problem for _, problem in usable(rows, parse, tally)]
    if tally.bad:
        logging.warning("%s: left out of the problems of %s: %s", source, part.split, tally.reasons())
    return problems


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
