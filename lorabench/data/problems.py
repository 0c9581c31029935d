"""Problem sets for RL, questions with answers that a grader can verify, and what a policy gets without solving them.

Those of the Hugging Face hub, or copies of them, are GSM8K, MATH, DeepMath, AIME 2024 and 2025. Each of their questions
ends with a request for a boxed answer, in the words of the Tinker cookbook. GSM8K has train and test splits; of MATH,
as in the cookbook, MATH-500 is the test split and everything else is trained on; DeepMath has a train split only, AIME
a test split only.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from operator import attrgetter
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import FileProblems, HubProblems, ProblemSpec, ReasoningProblems, SumProblems
from lorabench.data.chat import SPLITS, Split, UnusableRowError, is_first, take, wanted
from lorabench.data.files import Tally, file_problems, usable
from lorabench.data.grading import BOX, NUMBER_BOX, gsm8k_answer, last_box, number
from lorabench.data.hub import part_files, part_rows
from lorabench.data.reasoning import (
    Problem,
    interleaved,
    is_worked_template,
    sum_problems,
    task_problems,
    worked_solutions,
)
from lorabench.errors import UserError
from lorabench.utils.files import atomic_path, read_parquet
from lorabench.utils.hub import FetchedRepository, WantedRepository

_KEY = attrgetter("key")
_SCHEMA = pa.schema([(name, pa.string()) for name in ("split", "source", "question", "answer")])

_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
    *("prealgebra", "precalculus"),
)


Numbers = tuple[int, ...]
"""The whole numbers of a question, in their order."""
Exact = int | Fraction
Rule = Callable[[Numbers], Exact | None]
"""Returns an answer, or None where the rule gives none."""
_Read = tuple[Numbers, Exact | None]
"""A question's numbers and its answer, None for one that is no number."""

# Longer digits are split, since Python refuses to read very long ones.
_WHOLE = re.compile(r"\d{1,15}")
_MOST = 2000  # rules are fitted on so many problems at most


class _Part(NamedTuple):
    """A split of a repository with problems of a set: its place there, and how to read question and answer."""

    id: str
    config: str | None
    split: str
    question: str
    """The column of the question."""
    answer: str
    gold: Callable[[str], str | None] = str.strip
    """Extracts the short answer from the answer's text; None if there is none."""


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
    match spec:
        case HubProblems():
            train, test = _hub_pools(spec, fetched)
        case FileProblems():
            train = test = iter(file_problems(spec)[0])
        case SumProblems():
            train = test = sum_problems(spec.min_digits, spec.max_digits, spec.carries, spec.seed)
        case _:
            train = test = _reasoning_pool(spec)
    is_new = is_first(_KEY)
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


def _reasoning_pool(spec: ReasoningProblems) -> Iterator[Problem]:
    """Return distinct problems in random order: as many as the splits need, or fewer if the tasks have no more.

    Easy problems repeat soon, so problems that come late are harder, and must not make up a split of their own.
    """
    if spec.kind == "gsm_symbolic":
        generated = worked_solutions(is_worked_template, spec.seed)
    else:
        # The set's sizes have other names in some tasks of reasoning-gym.
        sizes = {name: getattr(spec, name) for name in ("min_digits", "max_digits", "min_terms", "max_terms")}
        numbers = {"min_numbers": spec.min_terms, "max_numbers": spec.max_terms, "max_value": spec.max_value}
        settings = {"chain_sum": sizes, "products": sizes, "gcd": numbers, "lcm": numbers}
        tasks = [task_problems(task, spec.seed, **settings.get(task, {})) for task in spec.tasks]
        generated = interleaved(tasks, spec.seed)

    def is_suitable(problem: Problem) -> bool:
        chars = len(problem.question) + len(problem.response)
        return chars <= spec.max_chars and number(problem.answer) is not None

    distinct = wanted(wanted(generated, is_suitable), is_first(_KEY))
    pool = list(islice(distinct, spec.train + spec.validation + spec.test))
    Random(spec.seed).shuffle(pool)
    return iter(pool)


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
    split_of: dict[str, str] = {}
    for row in rows:
        text = " ".join(row["question"].split())
        if split_of.setdefault(text, row["split"]) != row["split"]:
            raise UserError(f"splits {split_of[text]!r} and {row['split']!r} share the problem {text[:80]!r}")
    return rows


@dataclass(frozen=True)
class Controls:
    """The test accuracies, from 0 to 1, of answers that solve no problem."""

    constant: float
    """The accuracy of the most frequent answer."""
    rule: float
    """The accuracy of the best rule; at least that of the constant answer on the problems to train on."""
    rule_text: str
    """The description of the rule."""


def controls(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Controls:
    """Return what a policy gets without solving problems: by the best constant answer, and by the best cheap rule.

    A rule reads the numbers of a question and nothing else. One adds them without carries; the others are a start plus
    a constant for each value of a feature, such as the parities of the first two numbers: "2 if both are even, else 1"
    is such a rule. The constants are those that are right most often on the problems to train on, on which the best
    rule is chosen as well. A rule that solves all of them is the task itself and no control.

    Args:
        train: questions and answers of the problems to train on, at least one; the answers may be any text. Rules are
            fitted on the first _MOST.
        test: questions and answers of the test problems, at least one.
    """
    constant = Counter(answer for _, answer in train).most_common(1)[0][0]
    constant_accuracy = sum(answer == constant for _, answer in test) / len(test)
    train = train[:_MOST]
    learned, tested = ([_parsed(*problem) for problem in problems] for problems in (train, test))
    share, text, accuracy = sum(answer == constant for _, answer in train) / len(train), f"always {constant}", None
    for name, rule in _rules(learned).items():
        if share < (rule_share := _accuracy(rule, learned)) < 1:
            share, text, accuracy = rule_share, name, _accuracy(rule, tested)
    return Controls(constant_accuracy, constant_accuracy if accuracy is None else accuracy, text)


def _parsed(question: str, answer: str) -> _Read:
    value = number(answer.strip())
    # With whole numbers Python is much faster than with fractions.
    exact = int(value) if value is not None and value.denominator == 1 else value
    return tuple(map(int, _WHOLE.findall(question))), exact


def _accuracy(rule: Rule, problems: Sequence[_Read]) -> float:
    right = sum(answer is not None and bool(numbers) and rule(numbers) == answer for numbers, answer in problems)
    return right / len(problems)


def _rules(problems: Sequence[_Read]) -> dict[str, Rule]:
    """Return the rules by their descriptions, fitted to problems."""

    def without_carries(numbers: Numbers) -> int:
        places = range(max(len(str(value)) for value in numbers))
        return sum(sum(value // 10**place % 10 for value in numbers) % 10 * int(10**place) for place in places)

    def first_digits(numbers: Numbers) -> Hashable:
        return tuple(str(value)[0] for value in numbers)

    def zero(numbers: Numbers) -> int:
        return 0

    return {
        "the sum without carries": without_carries,
        "a constant for each pair of parities": _by_class(problems, zero, lambda n: tuple(v % 2 for v in n[:2])),
        "a constant for each tuple of first digits": _by_class(problems, zero, first_digits),
        "a constant for each tuple of last digits": _by_class(problems, zero, lambda n: tuple(v % 10 for v in n)),
        "the smallest + a constant for each tuple of first digits": _by_class(problems, min, first_digits),
    }


def _by_class(
    problems: Sequence[_Read], start: Callable[[Numbers], int], feature: Callable[[Numbers], Hashable]
) -> Rule:
    """Return the rule of a start plus the constant that is right most often in each class of a feature."""
    constants: dict[Hashable, Counter[Exact]] = defaultdict(Counter)
    for numbers, answer in problems:
        if answer is not None and numbers:
            constants[feature(numbers)][answer - start(numbers)] += 1
    frequent = {value: counted.most_common(1)[0][0] for value, counted in constants.items()}

    def rule(numbers: Numbers) -> Exact | None:
        constant = frequent.get(feature(numbers))
        return None if constant is None else start(numbers) + constant

    return rule
