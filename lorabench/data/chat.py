"""Chats: the examples of every SFT dataset, and how examples are drawn from endless sources."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar, get_args

from lorabench.config.fields import FileFormat
from lorabench.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Messages = list[dict[str, str]]
"""Turns in their order, each with `role` and `content`."""

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
CHATS = ("messages", "conversations")
# This many consecutive examples that are not wanted mean that there are no more.
_MAX_MISSES = 500

Row = dict[str, Any]
"""A row of a dataset file or a problem file: its `split` and `source`, and what the kind of file holds."""

Example = TypeVar("Example")


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an assistant's turn, and the name of its source.

    A plain text, to which no chat template is applied, is a single message of the role `text`.
    """

    source: str
    messages: Messages

    @classmethod
    def of(cls, source: str, question: str, response: str) -> Chat:
        """Return the chat of one question and its response."""
        return cls(source, [{"role": "user", "content": question}, {"role": "assistant", "content": response}])

    def chars(self) -> int:
        """Return the number of characters of all turns."""
        return sum(len(message["content"]) for message in self.messages)


def is_text(messages: Messages) -> bool:
    """Return whether the messages are a plain text rather than a chat."""
    return [message["role"] for message in messages] == ["text"]


def prompt(messages: Messages) -> str:
    """Return the text that identifies an example: all turns before the last, or the plain text; spaces normalized."""
    identifying = messages if is_text(messages) else messages[:-1]
    return "\n".join(" ".join(message["content"].split()) for message in identifying)


def text_digest(text: str) -> int:
    """Return a 64-bit hash of a text; the chance that two of a million collide is 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def wanted(examples: Iterable[Example], keep: Callable[[Example], bool]) -> Iterator[Example]:
    """Yield the examples to keep; end after many others in a row."""
    misses = 0
    for example in examples:
        if keep(example):
            misses = 0
            yield example
        elif (misses := misses + 1) > _MAX_MISSES:
            return


def is_first(key: Callable[[Example], Hashable]) -> Callable[[Example], bool]:
    """Return a function that says whether an example is the first that it is asked about with its key."""
    seen: set[Hashable] = set()

    def first(example: Example) -> bool:
        before = len(seen)
        seen.add(key(example))
        return len(seen) > before

    return first


def take(examples: Iterator[Example], count: int, what: str) -> Iterator[Example]:
    """Yield the next `count` examples, or raise UserError that there are fewer; the message calls them `what`."""
    taken = 0
    for example in islice(examples, count):
        taken += 1
        yield example
    if taken < count:
        raise UserError(f"found {taken} distinct {what}; {count} are needed")
