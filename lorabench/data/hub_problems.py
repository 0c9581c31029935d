"""Mathematical problem sets of the Hugging Face hub, or copies of them: GSM8K, MATH, DeepMath, AIME 2024 and 2025.

Each question ends with a request for a boxed answer, in the words of the Tinker cookbook. GSM8K has train and test
splits; of MATH, as in the cookbook, MATH-500 is the test split and everything else is trained on; DeepMath has a train
split only, AIME a test split only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

from lorabench.config.datasets import HubProblems
from lorabench.data.answers import gsm8k_answer, last_box
from lorabench.data.hub import part_files, part_rows
from lorabench.data.reasoning import Problem
from lorabench.data.rows import Tally, UnusableRowError, usable
from lorabench.errors import UserError
from lorabench.utils.hub import FetchedRepository, WantedRepository

BOX = r" Write your answer in \boxed{} format."
NUMBER_BOX = r" Provide a numerical answer without units, written inside \boxed{}."

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


def hub_pools(
    spec: HubProblems, fetched: Mapping[str, FetchedRepository]
) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """Return the problems to train on and the problems to test on, in an order that the seed decides.

    For DeepMath, which has no test split, both are the same iterator. Problems without an answer are left out, and
    their number is logged.

    Raises:
        UserError: the files do not exist, or can't be read.
    """
    train, test = (
        [problem for part in parts.get(spec.kind, []) for problem in _problems(spec, fetched, part)]
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


def _problems(spec: HubProblems, fetched: Mapping[str, FetchedRepository], part: _Part) -> list[Problem]:
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
