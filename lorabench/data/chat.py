"""Chats: what every SFT dataset is made of, whatever it comes from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Chat:
    """Messages (role, content) that end with an assistant's turn, and where they come from."""

    source: str
    messages: Messages

    @classmethod
    def of(cls, source: str, question: str, response: str) -> Chat:
        """A question and its response."""
        return cls(source, [{"role": "user", "content": question}, {"role": "assistant", "content": response}])

    def chars(self) -> int:
        """Characters of all turns."""
        return sum(len(message["content"]) for message in self.messages)


def prompt(messages: Messages) -> str:
    """All that comes before the last assistant turn, normalised: what makes two examples the same."""
    return "\n".join(" ".join(m["content"].split()) for m in messages[:-1])


def prompt_digest(messages: Messages) -> int:
    """Eight bytes that stand for a prompt: among a million, two are taken for one with a chance of 3e-8."""
    return int.from_bytes(hashlib.blake2b(prompt(messages).encode(), digest_size=8).digest(), "big")
