"""The documents of the tasks in this folder, read from a parquet file that lorabench made.

The file is the `path` in a task's `dataset_kwargs`. The documents are held in memory: lm-eval's own way, to load a
parquet file through the library `datasets`, would leave copies in the user's home folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from lorabench.data.grading import gsm8k_answer
from lorabench.data.problems import read_problems
from lorabench.data.sft import read_dataset
from lorabench.errors import UserError
from lorabench.utils.files import read_parquet

Documents = dict[str, Dataset]


def worked(path: str, **_: Any) -> Documents:
    """Return the question and final answer of each worked solution of the test split."""
    return _chats(path, gsm8k_answer)


def instruct(path: str, **_: Any) -> Documents:
    """Return the question and whole answer of each example of the test split."""
    return _chats(path, str.strip)


def arithmetic(path: str, **_: Any) -> Documents:
    """Return the question and answer of each problem of the test split."""
    rows = [row for row in read_problems(Path(path)) if row["split"] == "test"]
    return _test(path, [{name: row[name] for name in ("source", "question", "answer")} for row in rows])


def pretraining(path: str, **_: Any) -> Documents:
    """Return the documents of held-out pretraining text."""
    return _test(path, read_parquet(Path(path)).to_pylist())


def bits_of_response(doc: Mapping[str, str], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Return a response's log-likelihood in nats and its bytes, from which lm-eval computes bits per byte."""
    return {"bits_per_byte": (results[0][0], len(doc["response"].encode()))}


def _chats(path: str, answer: Callable[[str], str | None]) -> Documents:
    documents = []
    for row in read_dataset(Path(path)):
        if row["split"] == "test":
            question, response = (message["content"] for message in row["messages"])
            named = {"source": row["source"], "question": question, "response": response}
            documents.append(named | {"answer": answer(response)})
    return _test(path, documents)


def _test(path: str, documents: list[dict[str, Any]]) -> Documents:
    if not documents or any(None in document.values() for document in documents):
        raise UserError(f"{path} has no test document with an answer; was it made for this task?")
    return {"test": Dataset.from_list(documents)}
