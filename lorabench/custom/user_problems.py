"""A user's file of problems for reinforcement learning, examined before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config.datasets import FileProblems
from lorabench.custom.data import prepared_tokenizer
from lorabench.custom.model import UserModel
from lorabench.data.files import tally_of
from lorabench.data.rows import Tally
from lorabench.errors import UserError

GRADERS = ("number", "boxed")
"""Graders by name: `number` takes the last number of a response, `boxed` the content of its \\boxed{}."""
# The longest response in tokens by grader: a few steps up to a number, or a worked solution up to the box.
_RESPONSE_TOKENS = {"number": 256, "boxed": 1024}
# Guesses on the safe side: the fewest characters per token, and the most tokens of a chat template around a question.
_CHARS_PER_TOKEN, _TEMPLATE_TOKENS = 2, 64
_MOST_CHARS = 4000


@dataclass(frozen=True)
class UserProblems:
    """A user's file of questions and answers."""

    source: dict[str, Any]
    """The fields by which a preset names the problems: kind, path, grader, and the longest question in characters."""
    tally: Tally
    max_new_tokens: int
    """The longest response in tokens that leaves room for a question."""

    def __str__(self) -> str:
        return f"{self.name}: {self.tally}; responses of at most {self.max_new_tokens} tokens"

    @property
    def name(self) -> str:
        """The path that the user gave."""
        return str(self.source["path"])

    @property
    def usable(self) -> int:
        """The number of distinct problems with an answer."""
        return self.tally.usable


def examine_problems(model: UserModel, name: str, grader: str) -> tuple[UserProblems, str | None]:
    """Examine a file of problems for a model.

    Returns:
        The problems, and the `chat_template` that a preset must give the model, None if the model has its own.

    Raises:
        UserError: there is no such grader or file, or the file holds no problems with answers.
    """
    if grader not in GRADERS:
        raise UserError(f"grader {grader!r}: allowed: {', '.join(GRADERS)}")
    if not Path(name).is_file():
        raise UserError(f"problems {name!r} is no file; sets of the hub are named in a preset, such as `kind: gsm8k`")
    room = model.max_length or 10**9
    response = min(_RESPONSE_TOKENS[grader], room // 2)
    chars = min(_MOST_CHARS, max(32, _CHARS_PER_TOKEN * (room - response - _TEMPLATE_TOKENS)))
    source = {"kind": "file", "path": name, "grader": grader, "max_chars": chars}
    tally = tally_of(FileProblems.model_validate(source | dict.fromkeys(("train", "validation", "test"), 1)))
    return UserProblems(source, tally, response), prepared_tokenizer(model)[1]
