"""The section `datasets` of a preset: where examples for supervised fine-tuning (SFT) come from."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lorabench.config.fields import DataFile, FileFormat, Positive, Strict, check_copies


class ChatDataset(Strict):
    """An SFT dataset of distinct chats from reasoning-gym, split into train, validation and test."""

    kind: Literal["instruct", "worked"]
    """`instruct`: a mixture of 12 tasks with short answers; `worked`: gsm_symbolic with its chain of thought."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)] = 400
    """Longer examples (question and response together) are left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the problems."""


class DocstringsDataset(Strict):
    """Functions of Python packages with the first paragraph of their docstrings (see lorabench/data/docstrings.py).

    The splits come from different packages.
    """

    kind: Literal["docstrings"]
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32, le=800)] = 800
    """Longer examples (code and description together) are left out."""
    min_words: Annotated[int, Field(ge=14)] = 14
    """Shorter descriptions are left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of examples."""


class FactsDataset(Strict):
    """Random facts to be memorized. The test facts are the training facts, since nothing generalizes to others."""

    kind: Literal["facts"]
    facts: Positive
    """Number of facts."""
    digits: Positive = 8
    """Number of random digits of each answer, each of log2(10) bits."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the facts."""

    @property
    def train(self) -> int:
        """The number of training examples, which are the validation and test examples too."""
        return self.facts

    validation = test = train

    @property
    def entropy_bits(self) -> float:
        """The information in all answers together, in bits."""
        return self.facts * self.digits * math.log2(10)


class HubDataset(Strict):
    """Chats of a dataset on the Hugging Face hub, in its column `messages` or `conversations`."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. A tag or branch is fixed to its commit when it is first fetched (`results/<preset>/pins`);
    give a commit for runs that others can repeat."""
    config: str | None = None
    """Name of the dataset's configuration, where it has several."""
    split: str = "train"
    """The hub dataset's split from which all examples are taken."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)]
    """Longer examples (all turns together) are left out; all models are trained on the same examples."""
    max_tokens: Positive | None = None
    """Chosen examples of more tokens are left out of a model's training and tests, and counted; none is cut. Null where
    every example fits every model."""
    path: str | None = None
    """Folder with a copy of the repository, in a folder `owner/name`, that is read in place of the hub."""
    mean_tokens: Positive
    """Tokens of an average example, for the cost estimate."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of examples."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        check_copies(self.path)
        return self


class FileDataset(Strict):
    """Chats, pairs of prompt and completion, or plain texts of your own in a file (see lorabench/data/files.py)."""

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    format: FileFormat | None = None
    """The columns that hold an example; null where the file has the columns of one format only."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)]
    """Longer examples (all turns together) are left out."""
    mean_tokens: Positive
    """Tokens of an average example, for the cost estimate."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of examples."""


DatasetSpec = Annotated[
    ChatDataset | DocstringsDataset | FactsDataset | HubDataset | FileDataset, Field(discriminator="kind")
]
