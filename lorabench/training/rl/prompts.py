"""The problems of RL for one model: prompts as token ids, and the answers that responses are graded against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.data.problems import read_problems
from lorabench.errors import UserError
from lorabench.runs import Rollouts
from lorabench.training.rl.sampler import Response, Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedProblems:
    """One split of a problem set: the token ids of each prompt, and the answer of each problem."""

    prompts: list[tuple[int, ...]]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class ProblemTexts:
    """The conversion between texts and tokens for one model and problem set, and the stops of responses."""

    tokenizer: PreTrainedTokenizerBase
    rollouts: Rollouts
    max_length: int

    @cached_property
    def stop(self) -> Stop:
        """The conditions that end a response: end token, special tokens that close a turn, stop texts, length."""
        ends = {int(self.tokenizer.eos_token_id)}
        if self.rollouts.prompt is None:
            # Base models with a chat template may close a turn by another token than their end-of-text token.
            turn = self._chat("a", "b")[len(self._chat("a")) :]
            ends |= set(turn) & set(self.tokenizer.all_special_ids)
        return Stop(tuple(sorted(ends)), self.rollouts.max_new_tokens, self.rollouts.stop)

    def prompt(self, question: str) -> tuple[int, ...]:
        """Return the token ids of a question's prompt, by the chat template or by the preset's plain prompt."""
        if self.rollouts.prompt is None:
            return self._chat(question)
        encoded: Any = self.tokenizer(self.rollouts.prompt.replace("{question}", question))
        return tuple(encoded["input_ids"])

    def _chat(self, question: str, *response: str) -> tuple[int, ...]:
        """Return the token ids of a chat up to the assistant's turn, or through it if a response is given."""
        messages = [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": text} for text in response]
        encoded: Any = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=not response, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def text(self, response: Response) -> str:
        """Return the text of a response, up to the first stop text."""
        decoded: str = self.tokenizer.decode(response.tokens, skip_special_tokens=True)
        ends = [index for text in self.rollouts.stop if (index := decoded.find(text)) >= 0]
        return decoded[: min(ends, default=len(decoded))]

    def read(self, path: Path) -> dict[str, EncodedProblems]:
        """Read the splits of a problem set's file.

        Raises:
            UserError: the tokenizer has no chat template and the preset gives no prompt, or a prompt with the longest
                response exceeds the model's length.
        """
        if self.rollouts.prompt is None and not self.tokenizer.chat_template:
            name = self.tokenizer.name_or_path
            raise UserError(f"the tokenizer {name!r} has no chat template; give the RL experiment a `prompt`")
        splits = {split: EncodedProblems([], []) for split in ("train", "validation", "test")}
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
