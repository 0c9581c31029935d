"""Problems as a run meets them: prompts in token ids, and the answers to grade against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lorabench.data.problems import read_problems
from lorabench.errors import UserError
from lorabench.plan import Rollouts
from lorabench.training.rl.sampler import Response, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problems:
    """One split: prompt and answer of each problem."""

    prompts: list[tuple[int, ...]]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Texts:
    """How text becomes tokens and responses become rewards, for one model and problem set."""

    tokenizer: PreTrainedTokenizerBase
    rollouts: Rollouts
    max_length: int

    @cached_property
    def stop(self) -> Stop:
        """What ends a response: the end token, those special tokens that close a turn of the template, the texts."""
        ends = {int(self.tokenizer.eos_token_id)}
        if self.rollouts.prompt is None:
            # Base models with a template may close a turn by another token than their end of text.
            turn = self._chat("a", "b")[len(self._chat("a")) :]
            ends |= set(turn) & set(self.tokenizer.all_special_ids)
        return Stop(tuple(sorted(ends)), self.rollouts.max_new_tokens, self.rollouts.stop)

    def prompt(self, question: str) -> tuple[int, ...]:
        """Token ids of a question: the chat template's, or those of the preset's plain prompt."""
        if self.rollouts.prompt is None:
            return self._chat(question)
        encoded: Any = self.tokenizer(self.rollouts.prompt.replace("{question}", question))
        return tuple(encoded["input_ids"])

    def _chat(self, question: str, response: str | None = None) -> tuple[int, ...]:
        """Token ids of a chat, up to where the assistant starts, or through its turn."""
        messages = [{"role": "user", "content": question}]
        messages += [] if response is None else [{"role": "assistant", "content": response}]
        encoded: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=response is None, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def text(self, response: Response) -> str:
        """What a response says, up to the text that ended it."""
        said: str = self.tokenizer.decode(response.tokens, skip_special_tokens=True)
        ends = [place for text in self.rollouts.stop if (place := said.find(text)) >= 0]
        return said[: min(ends, default=len(said))]

    def read(self, path: Path) -> dict[str, Problems]:
        """The splits of a problem set's file.

        Raises:
            UserError: the tokenizer has no chat template and the preset gives no prompt; or a prompt with the longest
                response does not fit the model.
        """
        if self.rollouts.prompt is None and not self.tokenizer.chat_template:
            name = self.tokenizer.name_or_path
            raise UserError(f"the tokenizer {name!r} has no chat template; give the RL experiment a `prompt`")
        splits: dict[str, Problems] = {split: Problems([], []) for split in ("train", "validation", "test")}
        for row in read_problems(path):
            prompt = self.prompt(row["question"])
            if len(prompt) + self.rollouts.max_new_tokens > self.max_length:
                raise UserError(
                    f"a problem of {len(prompt)} tokens with a response of {self.rollouts.max_new_tokens} is more than "
                    f"the {self.max_length} tokens that the model takes: {row['question'][:80]!r}"
                )
            splits[row["split"]].prompts.append(prompt)
            splits[row["split"]].answers.append(row["answer"])
        return splits


class Grades(Protocol):
    """Tells right answers from wrong ones: `lorabench.data.grading.Grader`, or one that asks it."""

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each response gives the right answer of the same place."""


def grade(grader: Grades, texts: list[str], answers: list[str]) -> np.ndarray:
    """Rewards, (n,): 1 for a right answer, else 0."""
    return np.array(grader.grade(texts, answers), dtype=np.float64)
