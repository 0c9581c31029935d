"""What is known of a file of problems before it is used in reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabench.config import FileProblems
from lorabench.data.files import tally_of
from lorabench.data.rows import Tally
from lorabench.errors import UserError
from lorabench.own.data import prepared_tokenizer
from lorabench.own.model import Model

GRADERS = ("number", "boxed")
# Longest responses, by how they are graded: a number after a few steps, or a worked solution with a box.
_RESPONSE_TOKENS = {"number": 256, "boxed": 1024}
# Characters a token at least, and tokens of a chat template around a question. Guesses, on the safe side.
_CHARS_PER_TOKEN, _TEMPLATE_TOKENS = 2, 64
_MOST_CHARS = 4000


@dataclass(frozen=True)
class Problems:
    """A file of questions and answers that a user named."""

    source: dict[str, Any]
    """For a preset: kind, path, grader, and the longest question."""
    tally: Tally
    max_new_tokens: int
    """Longest response that leaves room for a question."""

    def __str__(self) -> str:
        return f"{self.name}: {self.tally}; responses of at most {self.max_new_tokens} tokens"

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return str(self.source["path"])

    @property
    def usable(self) -> int:
        """Distinct problems with an answer."""
        return self.tally.usable


def look_at_problems(model: Model, name: str, grader: str) -> tuple[Problems, str | None]:
    """What is known of a file of problems, and the `chat_template` that a preset has to give a model without one.

    Raises:
        UserError: no such grader, no such file, or a file that holds no problems with answers.
    """
    if grader not in GRADERS:
        raise UserError(f"grader {grader!r}: allowed: {', '.join(GRADERS)}")
    if not Path(name).is_file():
        raise UserError(f"problems {name!r} is no file; sets of the hub are named in a preset, such as `kind: gsm8k`")
    room = model.max_length or 10**9
    new = min(_RESPONSE_TOKENS[grader], room // 2)
    chars = min(_MOST_CHARS, max(32, _CHARS_PER_TOKEN * (room - new - _TEMPLATE_TOKENS)))
    source = {"kind": "file", "path": name, "grader": grader, "max_chars": chars}
    tally = tally_of(FileProblems.model_validate(source | dict.fromkeys(("train", "validation", "test"), 1)))
    return Problems(source, tally, new), prepared_tokenizer(model)[1]
