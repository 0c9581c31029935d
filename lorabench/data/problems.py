"""Problem sets for RL, questions with answers that a grader can verify, and what a policy gets without solving them.

Those of the Hugging Face hub are GSM8K, MATH, DeepMath, AIME 2024 and 2025. Each of their questions
ends with a request for a boxed answer, in the words of the Tinker cookbook. GSM8K has train and test splits; of MATH,
as in the cookbook, MATH-500 is the test split and everything else is trained on; DeepMath has a train split only, AIME
a test split only.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import (
    FileProblems,
    GeneratedSplits,
    HubProblems,
    ProblemSpec,
    ReasoningProblems,
    SumProblems,
)
from lorabench.data.chat import SPLITS, Split, is_first, take, wanted
from lorabench.data.files import Tally, UnusableRowError, file_problems, part_rows, usable
from lorabench.data.grading import BOX, NUMBER_BOX, gsm8k_answer, last_box, number
from lorabench.data.reasoning import Problem, mixture, sum_problems, worked_solutions
from lorabench.utils.files import atomic_path, read_parquet
from lorabench.utils.hub import FetchedRepository, WantedRepository

_SCHEMA = pa.schema([(name, pa.string()) for name in ("split", "source", "question", "answer")])


class _Part(NamedTuple):
    """A split of a repository with problems of a set: its place there, and how to read question and answer."""

    kind: str
    use: str  # For `train`, from which validation is held out, or for `test`.
    id: str
    config: str | None
    split: str
    question: str  # The column of the question.
    answer: str  # The column of the answer, from whose text `gold` extracts the short one; None if there is none.
    gold: Callable[[str], str | None] = str.strip


_SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"),
    *("prealgebra", "precalculus"),
)
_PARTS = (
    _Part("gsm8k", "train", "openai/gsm8k", "main", "train", "question", "answer", gsm8k_answer),
    _Part("gsm8k", "test", "openai/gsm8k", "main", "test", "question", "answer", gsm8k_answer),
    *(
        _Part("math", "train", "EleutherAI/hendrycks_math", subject, split, "problem", "solution", last_box)
        for subject in _SUBJECTS
        for split in ("train", "test")
    ),
    _Part("math", "test", "HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    _Part("deepmath", "train", "zwhe99/DeepMath-103K", None, "train", "question", "final_answer"),
    _Part("aime24", "test", "HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    _Part("aime25", "test", "math-ai/aime25", None, "test", "problem", "answer"),
)


def repositories(spec: HubProblems) -> list[WantedRepository]:
    """Return the repositories to fetch for a problem set."""
    parts: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for part in _PARTS:
        if part.kind == spec.kind:
            parts[part.id].append((part.config, part.split))
    revisions = spec.revisions
    return [WantedRepository("dataset", name, revisions.get(name, "main"), tuple(parts[name])) for name in parts]


def make_problems(
    spec: ProblemSpec, fetched: Mapping[str, FetchedRepository] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Return the rows of a problem set (split, source, question, answer), distinct by question across all splits.

    The repositories of a problem set of the hub are `fetched`, by id. UserError says that there are too few problems.
    """
    match spec:
        case HubProblems():
            train, test = _hub_pools(spec, fetched)
        case FileProblems():
            train = test = iter(file_problems(spec)[0])
        case _:
            train = test = _generated(spec)
    is_new: Callable[[Problem], bool] = is_first(lambda problem: problem.key)
    # Held-out splits are drawn first, so that those of the hub do not depend on the number of training problems.
    pools: dict[Split, Iterator[Problem]] = {"test": test, "validation": train, "train": train}
    taken = {
        split: list(take(wanted(pool, is_new), getattr(spec, split), f"{split} problems of kind {spec.kind!r}"))
        for split, pool in pools.items()
    }
    if isinstance(spec, GeneratedSplits) and spec.test_seed is not None:
        others = wanted(_generated(spec.model_copy(update={"seed": spec.test_seed})), is_new)
        taken["test"] = list(take(others, spec.test, f"other test problems of kind {spec.kind!r}"))
    return [
        {"split": split, "source": problem.source, "question": problem.question, "answer": problem.answer}
        for split in SPLITS
        for problem in taken[split]
    ]


def _generated(spec: ReasoningProblems | SumProblems) -> Iterator[Problem]:
    """Return generated problems in an order that the seed decides.

    Easy problems repeat soon, so those that come late are harder, and must not make up a split of their own.
    """
    if isinstance(spec, SumProblems):
        return sum_problems(spec.min_digits, spec.max_digits, spec.carries, spec.seed)
    if spec.kind == "gsm_symbolic":
        generated = worked_solutions("odd", spec.seed)
    else:
        # The set's sizes have other names in some tasks of reasoning-gym.
        sizes = {name: getattr(spec, name) for name in ("min_digits", "max_digits", "min_terms", "max_terms")}
        numbers = {"min_numbers": spec.min_terms, "max_numbers": spec.max_terms, "max_value": spec.max_value}
        settings = {"chain_sum": sizes, "products": sizes, "gcd": numbers, "lcm": numbers}
        generated = mixture(spec.tasks, spec.seed, settings)

    def is_suitable(problem: Problem) -> bool:
        chars = len(problem.question) + len(problem.response)
        return chars <= spec.max_chars and number(problem.answer) is not None

    distinct = wanted(wanted(generated, is_suitable), is_first(lambda problem: problem.key))
    pool = list(islice(distinct, spec.train + spec.validation + spec.test))
    Random(spec.seed).shuffle(pool)
    return iter(pool)


def _hub_pools(
    spec: HubProblems, fetched: Mapping[str, FetchedRepository]
) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Return the problems to train on and those to test on, for DeepMath the same iterator, in an order by the seed."""
    suffix = NUMBER_BOX if spec.kind == "gsm8k" else BOX
    pools: dict[str, list[Problem]] = {"train": [], "test": []}
    for part in _PARTS:
        if part.kind != spec.kind:
            continue
        source = "/".join(name for name in (part.id, part.config) if name)

        def parse(content: dict[str, Any], part: _Part = part, source: str = source) -> Problem:
            question, text = content[part.question], content[part.answer]
            answer = None if text is None else part.gold(str(text))
            if not question or not answer:
                raise UnusableRowError("without an answer")
            return Problem(source, question.strip() + suffix, answer)

        tally = Tally("problems")
        # The other columns are not read: DeepMath also has three long solutions of each problem.
        columns = [[part.question], [part.answer]]
        rows = part_rows(fetched[part.id].data_files(part.config, part.split), part.id, columns)
        pools[part.use] += [problem for _, problem in usable(rows, parse, tally)]
        if tally.bad:
            logging.warning("%s: left out of the problems of %s: %s", source, part.split, tally.reasons())
    for pool in pools.values():
        Random(spec.seed).shuffle(pool)
    # MATH-500 is a part of Hendrycks' MATH.
    tested = {problem.key for problem in pools["test"]}
    train = (problem for problem in pools["train"] if problem.key not in tested)
    return train, iter(pools["test"]) if pools["test"] else train


def write_problems(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as parquet; the file appears only once it is complete."""
    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), partial)


def read_problems(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a problem file, or raise UserError if it is missing or damaged."""
    rows: list[dict[str, Any]] = read_parquet(path, _SCHEMA).to_pylist()
    return rows


class Controls(NamedTuple):
    """The test accuracies, from 0 to 1, of answers that solve no problem."""

    constant: float  # Of the most frequent answer.
    rule: float  # Of the best rule; at least that of the constant answer on the problems to train on.
    rule_text: str  # What the rule is.


_Numbers = tuple[int, ...]
"""The whole numbers of a question, in their order."""
_Answer = int | Fraction | None
"""The answer to a problem: None for one that is no number, and where a rule gives none."""

# Longer digits are split, since Python refuses to read very long ones.
_WHOLE = re.compile(r"\d{1,15}")
_MOST = 2000  # rules are fitted on so many problems at most


def _first_digits(numbers: _Numbers) -> Hashable:
    return tuple(str(value)[0] for value in numbers)


_FEATURES: dict[str, tuple[Callable[[_Numbers], int], Callable[[_Numbers], Hashable]]] = {
    "a constant for each pair of parities": (lambda n: 0, lambda n: tuple(value % 2 for value in n[:2])),
    "a constant for each tuple of first digits": (lambda n: 0, _first_digits),
    "a constant for each tuple of last digits": (lambda n: 0, lambda n: tuple(value % 10 for value in n)),
    "the smallest + a constant for each tuple of first digits": (min, _first_digits),
}
"""Rules: each is a start plus a constant for each value of a feature."""


def controls(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> Controls:
    """Return what a policy gets on test problems without solving them, by the best constant answer and by a cheap rule.

    Given are questions and answers, at least one of each. A rule reads the numbers of a question and nothing else. One
    adds them without carries; the others are `_FEATURES`, whose constants are those that are right most often on the
    first problems to train on, by which the best rule is chosen as well. A rule that solves all is the task itself.
    """

    def read(problems: Sequence[tuple[str, str]]) -> list[tuple[_Numbers, _Answer]]:
        values = [(question, number(answer.strip())) for question, answer in problems]
        # With whole numbers Python is much faster than with fractions.
        return [
            (tuple(map(int, _WHOLE.findall(text))), int(value) if value is not None and value == int(value) else value)
            for text, value in values
        ]

    def without_carries(numbers: _Numbers) -> int:
        places = range(max(len(str(value)) for value in numbers))
        return sum(sum(value // 10**place % 10 for value in numbers) % 10 * int(10**place) for place in places)

    def fitted(start: Callable[[_Numbers], int], feature: Callable[[_Numbers], Hashable]) -> Callable[..., _Answer]:
        constants: dict[Hashable, Counter[int | Fraction]] = defaultdict(Counter)
        for numbers, answer in learned:
            if answer is not None and numbers:
                constants[feature(numbers)][answer - start(numbers)] += 1
        frequent = {value: counted.most_common(1)[0][0] for value, counted in constants.items()}
        return lambda n: start(n) + frequent[feature(n)] if feature(n) in frequent else None

    def accuracy(rule: Callable[..., _Answer], problems: Sequence[tuple[_Numbers, _Answer]]) -> float:
        right = sum(answer is not None and bool(numbers) and rule(numbers) == answer for numbers, answer in problems)
        return right / len(problems)

    constant = Counter(answer for _, answer in train).most_common(1)[0][0]
    constant_accuracy = sum(answer == constant for _, answer in test) / len(test)
    train = train[:_MOST]
    learned = read(train)
    rules = {"the sum without carries": without_carries} | {text: fitted(*rule) for text, rule in _FEATURES.items()}
    share, best = sum(answer == constant for _, answer in train) / len(train), None
    for text, rule in rules.items():
        if share < (rule_share := accuracy(rule, learned)) < 1:
            share, best = rule_share, text
    if best is None:
        return Controls(constant_accuracy, constant_accuracy, f"always {constant}")
    return Controls(constant_accuracy, accuracy(rules[best], read(test)), best)
