"""Training data in a user's file of JSON lines or JSON: its examples, and how many there are.

The columns decide what a row is (FORMATS): a chat, a pair of a prompt and its answer, or a plain text. Each prompt
counts once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advice.errors import UserError

CHATS = ("messages", "conversations")
FORMATS = (*CHATS, "prompt/completion", "prompt/response", "instruction/output", "question/answer", "text")
"""The columns that hold an example; of several, a chat takes precedence over a pair, and a pair over a text."""
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_CHARS_PER_TOKEN = 3.0  # a rough guess: English prose has about 4 characters per token, code and digits about 2
_NOT_JSON = "not JSON"

Messages = list[dict[str, str]]
"""Turns in their order, each with `role` and `content`; of a plain text, one turn of the role `text`."""


class _UnusableRowError(ValueError):
    """A row is not a usable example; the message is the reason."""


@dataclass(frozen=True)
class UserData:
    """A user's data file, which was read once."""

    path: Path
    form: str  # one of FORMATS
    usable: int  # the number of distinct usable examples
    tokens: float  # a guess of the number of scored tokens: those of the last turns, or all of a text
    unusable: Counter[str]  # the number of rows that can't be used, by the reason
    one_answer: bool  # whether each example has one turn of the assistant, the last

    def __str__(self) -> str:
        reasons = "".join(f"; {count} left out: {reason}" for reason, count in self.unusable.most_common())
        return f"{self.path}: {self.usable} examples in {self.form}{reasons}"


def read_data(path: Path, form: str | None = None) -> UserData:
    """Read a data file once, and count its usable examples; raises UserError if it has none."""
    if form is not None and form not in FORMATS:
        raise UserError(f"format {form!r}: allowed: {', '.join(FORMATS)}")
    if form is None:
        columns = next((list(row) for row in _rows(path) if isinstance(row, dict)), [])
        forms = [known for known in FORMATS if set(known.split("/")) <= set(columns)]
        chosen = [known for known in forms if known in CHATS][:1] or [known for known in forms if "/" in known] or forms
        if len(chosen) > 1:
            raise UserError(f"{path} may be read as {' or '.join(chosen)}; --format says as which")
        if not chosen:
            names = ", ".join(repr(name)[:80] for name in columns[:20]) or "none"
            raise UserError(f"{path} has the columns {names}; needed are those of one format: {', '.join(FORMATS)}")
        form = chosen[0]
    unusable, usable, chars, one_answer = Counter[str](), 0, 0, True
    for messages in examples(path, form, unusable):
        usable += 1
        chars += len(messages[-1]["content"])
        one_answer &= [turn["role"] for turn in messages].count("assistant") == 1
    if not usable:
        reasons = ", ".join(f"{count} {reason}" for reason, count in unusable.most_common())
        raise UserError(f"{path}: none of its rows can be used as {form}: {reasons}")
    return UserData(path, form, usable, chars / _CHARS_PER_TOKEN, unusable, one_answer)


def examples(path: Path, form: str, unusable: Counter[str] | None = None) -> Iterator[Messages]:
    """Yield the usable examples of a file, each prompt once; `unusable` counts the other rows by their reason."""
    prompts = set[int]()
    for row in _rows(path):
        try:
            messages = _messages(row, form)
            # Hashes take less memory than prompts.
            prompt = hash(" ".join(" ".join(turn["content"] for turn in messages[:-1] or messages).split()))
            if prompt in prompts:
                raise _UnusableRowError("repeated prompt")
            prompts.add(prompt)
            yield messages
        except _UnusableRowError as error:
            if unusable is not None:
                unusable[str(error)] += 1


def _rows(path: Path) -> Iterator[Any]:
    """Yield the rows of a file; one that is no mapping is no example."""
    if path.suffix not in (".jsonl", ".json"):
        raise UserError(f"data file {str(path)!r} must end in .jsonl or .json")
    try:
        with path.open(encoding="utf-8-sig") as file:
            is_array = path.suffix == ".json" and file.read(4096).lstrip().startswith("[")
            file.seek(0)
            if is_array:
                yield from json.load(file)
                return
            for line in filter(str.strip, file):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = _NOT_JSON
                yield row
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _messages(row: Any, form: str) -> Messages:
    """Return the turns of a row, or raise the reason why it is not an example of that format."""
    if not isinstance(row, dict):
        raise _UnusableRowError(_NOT_JSON if row == _NOT_JSON else "not an object")
    if form == "text":
        return [{"role": "text", "content": _text(row.get("text"))}]
    if form in CHATS:
        messages = _turns(row.get(form))
    else:
        asked, answered = (row.get(name) for name in form.split("/"))
        if form.startswith("instruction") and row.get("input"):
            asked = f"{_text(asked)}\n\n{_text(row['input'])}"
        messages = []
        # Each side of a pair is a text or a list of turns.
        for value, role in ((asked, "user"), (answered, "assistant")):
            messages += _turns(value) if isinstance(value, list) else [{"role": role, "content": _text(value)}]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise _UnusableRowError("does not end with a turn of the assistant")
    return messages


def _turns(value: Any) -> Messages:
    """Return turns with `role` and `content`, or with `from` and `value`, as messages."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _UnusableRowError("not a list of turns")
    messages = []
    for turn in value:
        role, content = _ROLES.get(str(turn.get("role") or turn.get("from"))), turn.get("content") or turn.get("value")
        if role is None:
            raise _UnusableRowError(f"a turn of unknown role (known: {', '.join(_ROLES)})")
        # Many datasets have an empty system prompt.
        if content or role != "system":
            messages.append({"role": role, "content": _text(content)})
    return messages


def _text(value: Any) -> str:
    """Return a value of a row as text; a number is converted, since JSON holds answers as numbers."""
    text = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip():
        raise _UnusableRowError("no text")
    return text
