"""Mathematical problem sets of the Hugging Face hub, or copies of them: GSM8K, MATH, DeepMath, AIME 2024 and 2025.

Questions end with the cookbook's request for a box. Splits: GSM8K's own; MATH as the cookbook has it, which tests on
MATH-500 and trains on everything else; DeepMath has one split only; AIME is a test.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from lorabench.config import HubProblems
from lorabench.data.answers import gsm8k_answer, last_box
from lorabench.data.hub import hub_rows
from lorabench.data.reasoning import Problem
from lorabench.errors import UserError

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
    """Where some of a set's problems are, and how they are written down."""

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


def hub_pools(spec: HubProblems) -> tuple[Iterator[Problem], Iterator[Problem]]:
    """All problems to train on and all to test on, in an order that the seed decides; one and the same for DeepMath.

    What can't be graded is left out, and logged.

    Raises:
        UserError: the data can't be fetched or read.
    """
    train, test = (
        [problem for part in parts.get(spec.kind, []) for problem in _problems(spec, part)] for parts in (_TRAIN, _TEST)
    )
    for pool in (train, test):
        Random(spec.seed).shuffle(pool)
    if spec.kind not in _TEST:
        everything = iter(train)
        return everything, everything
    # The test problems are a part of Hendrycks' MATH.
    tested = {problem.key for problem in test}
    return (problem for problem in train if problem.key not in tested), iter(test)


def _problems(spec: HubProblems, part: _Part) -> list[Problem]:
    suffix = NUMBER_BOX if spec.kind == "gsm8k" else BOX
    source = "/".join(name for name in (part.id, part.config) if name)
    problems, without = [], 0
    for row in _rows(spec, part):
        question, text = row[part.question], row[part.answer]
        answer = None if text is None else part.gold(str(text))
        if question and answer:
            problems.append(Problem(source, question.strip() + suffix, answer))
        else:
            without += 1
    if without:
        logging.warning("%s: left out %d problems of %s without an answer", source, without, part.split)
    return problems


def _rows(spec: HubProblems, part: _Part) -> Iterator[dict[str, Any]]:
    """The rows of a part, with its two columns.

    Raises:
        UserError: a part, a column or a file that is not as it should be.
    """
    if spec.path is not None:
        yield from _local_rows(Path(spec.path), part)
        return
    rows = hub_rows(part.id, part.config, part.split, spec.revisions.get(part.id, "main"))
    _check_columns(rows.column_names, part, part.id)
    # DeepMath also has three long solutions of each problem.
    yield from rows.select_columns([part.question, part.answer])


def _local_rows(path: Path, part: _Part) -> Iterator[dict[str, Any]]:
    folder = path.joinpath(part.id, part.config or "")
    files = [file for file in sorted(folder.rglob(f"{part.split}*")) if file.suffix in (".parquet", ".jsonl")]
    if not files:
        raise UserError(f"folder {folder} has no {part.split}*.parquet or {part.split}*.jsonl")
    for file in files:
        if file.suffix == ".parquet":
            _check_columns(pq.read_schema(file).names, part, file)
            yield from pq.read_table(file, columns=[part.question, part.answer]).to_pylist()
        else:
            yield from _json_rows(file, part)


def _json_rows(file: Path, part: _Part) -> Iterator[dict[str, Any]]:
    # Texts hold other line ends, such as U+2028, that are none here.
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}:{number} is no JSON: {error}") from error
            _check_columns(row, part, f"{file}:{number}")
            yield row


def _check_columns(names: Any, part: _Part, where: object) -> None:
    for name in (part.question, part.answer):
        if name not in names:
            raise UserError(f"{where} has the columns {', '.join(names)}; {name} is needed")
