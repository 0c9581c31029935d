"""The pretraining text of the tiny bases, on whose held-out part an evaluation measures what fine-tuning has forgotten.

The held-out text is that of the shipped held-out losses: the first documents of the seed that follows the seed of the
training text. All tiny bases but those of sums share the pretraining tasks and the seed, so one file serves them all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from lorabench.data.reasoning import INSTRUCT_TASKS, PRETRAIN_TASKS, Problem, mixture, worked_solutions
from lorabench.models.specs import shipped_folder
from lorabench.store.io import write_table

# The end token ends pretraining documents as well as assistants' turns, so that the base has learned it.
END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"


def pretraining_problems(recipe: Mapping[str, Any], seed: int) -> Iterator[Problem]:
    """Yield short problems without end by a base's `recipe.json`: of pretraining, and rarely of fine-tuning's pools."""
    common = worked_solutions("even", seed), mixture(PRETRAIN_TASKS, seed)
    rare = worked_solutions("odd", seed), mixture(INSTRUCT_TASKS, seed)
    rng = Random(seed)
    while True:
        solutions, tasks = rare if rng.random() < recipe["rare_share"] else common
        problem = next(solutions if rng.random() < recipe["worked_share"] else tasks)
        if len(problem.question) + len(problem.response) <= recipe["max_document_chars"]:
            yield problem


def documents(problems: Iterable[Problem], chat_share: float, seed: int) -> Iterator[str]:
    """Yield pretraining documents: plain text, and a share of chats, as in modern mid-training."""
    rng = Random(seed)
    for problem in problems:
        if rng.random() < chat_share:
            yield f"{USER}{problem.question}{ASSISTANT}{problem.response}{END}"
        else:
            forms = (("", "\n"), ("Question: ", "\nAnswer: "), ("Problem: ", "\n\nSolution: "))
            question, answer = rng.choice(forms)
            yield f"{question}{problem.question}{answer}{problem.response}{END}"


def write_pretraining(count: int, path: Path) -> None:
    """Write the first `count` held-out documents of the tiny bases as parquet with a column `text`.

    They lack the end token, which is not scored.
    """
    recipe = json.loads((shipped_folder("llama-128") / "recipe.json").read_text())["recipe"]
    seed = recipe["seed"] + 1
    heldout = documents(pretraining_problems(recipe, seed), recipe["chat_share"], seed)
    write_table(pa.table({"text": [text.removesuffix(END) for text in islice(heldout, count)]}), path)
