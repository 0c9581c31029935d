"""A user's dataset or problems, examined before use: the format, usable and unusable rows, and numbers of tokens."""

from __future__ import annotations

import os
import statistics
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from lorabench.config.fields import FileFormat
from lorabench.config.inputs import FileProblems, GgufModel, HubModel
from lorabench.custom.model import HUB_ID, UserModel
from lorabench.data.chat import FORMATS, Chat, formats_in, is_text
from lorabench.data.files import Tally, chosen_format, file_problems, file_rows, usable_chats
from lorabench.data.tokens import encode_chat
from lorabench.errors import UserError
from lorabench.models.specs import template_text
from lorabench.utils.hub import WantedRepository, look_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# At most this many examples are tokenized; a larger dataset is judged by a random sample of this size.
_SAMPLE = 2000
# At most this many rows of a dataset of the hub are read.
_HUB_ROWS = 20_000
# A rough guess for use without a tokenizer: English prose has about 4 characters per token, code and digits about 2.
_CHARS_PER_TOKEN = 3.0
# The sample may miss the densest examples, so the limit on characters stays below what the sample suggests.
_MARGIN = 0.9

# The longest response in tokens by grader: a few steps up to the last number, or a worked solution up to its \boxed{}.
_RESPONSE_TOKENS = {"number": 256, "boxed": 1024}
# Guesses on the safe side: the fewest characters per token, and the most tokens of a chat template around a question.
_FEWEST_CHARS_PER_TOKEN, _TEMPLATE_TOKENS = 2, 64
_MOST_CHARS = 4000


@dataclass(frozen=True)
class UserSource:
    """A user's dataset or file of problems."""

    name: str
    """The path or id that the user gave."""
    source: dict[str, Any]
    """The fields by which a preset names it, such as kind, and path or id."""
    tally: Tally
    usable: int
    """The number of distinct usable examples; for a large dataset of the hub, estimated from its first rows."""


@dataclass(frozen=True)
class UserData(UserSource):
    """A user's dataset."""

    max_chars: int
    """The number of characters of the longest example that fits the model."""
    mean_tokens: float
    """The mean number of tokens of an example."""
    mean_completion_tokens: float
    """The mean number of scored tokens of an example."""
    guess: str = ""
    """A remark if tokens were not counted with the model's tokenizer."""

    def __str__(self) -> str:
        scored = f"{self.mean_completion_tokens:.0f} of them scored{self.guess}"
        return f"{self.name}: {self.tally}\nabout {self.mean_tokens:.0f} tokens per example, {scored}"


@dataclass(frozen=True)
class UserProblems(UserSource):
    """A user's file of questions and answers."""

    max_new_tokens: int
    """The longest response in tokens that leaves room for a question."""

    def __str__(self) -> str:
        return f"{self.name}: {self.tally}; responses of at most {self.max_new_tokens} tokens"


def load_tokenizer(model: UserModel) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Return the model's tokenizer, and the `chat_template` that it is given if it has none of its own.

    The tokenizer is None for a model of the hub that is not on this machine; UserError if a local model has none.
    """
    from lorabench.models import base

    spec = model.spec
    try:
        tokenizer = base.gguf_tokenizer(Path(spec.path)) if isinstance(spec, GgufModel) else base.load_tokenizer(spec)
    except UserError:
        if isinstance(spec, HubModel):
            return None, None
        raise
    if tokenizer.chat_template:
        return tokenizer, None
    tokenizer.chat_template = template_text("plain")
    return tokenizer, "plain"


def examine(model: UserModel, name: str, form: str | None) -> tuple[UserData, str | None]:
    """Read a dataset for a model, and count its usable rows and their tokens; return its template too.

    Given is the name of a data file, or the id of a dataset of the hub with the column `messages` or `conversations`,
    and the format, if the user named one.
    """
    tokenizer, template = load_tokenizer(model)
    wanted = next((known for known in FORMATS if known == form), None)
    if wanted is None and form is not None:
        raise UserError(f"format {form!r}: allowed: {', '.join(FORMATS)}")
    source, form, share = _identified(name, wanted)
    chats, tally = _chats(source, form)
    # The sample is drawn by reservoir sampling.
    rng, sample, lengths = Random(0), list[Chat](), array("q")
    for chat in chats:
        lengths.append(chat.chars())
        if len(sample) < _SAMPLE:
            sample.append(chat)
        elif (place := rng.randrange(len(lengths))) < _SAMPLE:
            sample[place] = chat
    if not lengths:
        raise UserError(f"{name}: none of its {tally.rows} rows can be used as {form}: {tally.reasons()}")
    # The numbers of all tokens and of scored tokens of each example in the sample.
    tokens: list[tuple[float, float]] = []
    for chat in sample:
        if tokenizer is not None:
            ids, mask = encode_chat(tokenizer, chat.messages)
            tokens.append((len(ids), sum(mask)))
        else:
            scored_chars = chat.chars() if is_text(chat.messages) else len(chat.messages[-1]["content"])
            tokens.append((chat.chars() / _CHARS_PER_TOKEN, scored_chars / _CHARS_PER_TOKEN))
    longest = max(lengths)
    if model.max_length is not None:
        limit = _limit([chat.chars() for chat in sample], [total for total, _ in tokens], lengths, model.max_length)
        longest = max((length for length in lengths if length <= limit), default=0)
    if not longest:
        raise UserError(f"{name}: no example fits the {model.max_length} tokens that the model takes")
    if longest < max(lengths):
        chats, tally = _chats(source, form, longest)
        deque(chats, maxlen=0)
    # If the whole sample is too long, its means are the only estimate.
    kept = [counts for chat, counts in zip(sample, tokens, strict=True) if chat.chars() <= longest] or tokens
    mean, scored = (statistics.fmean(column) for column in zip(*kept, strict=True))
    guess = f" (a guess: {_CHARS_PER_TOKEN:g} characters per token)" if tokenizer is None else ""
    return UserData(name, source, tally, int(tally.usable * share), longest, mean, scored, guess), template


def _identified(name: str, wanted: FileFormat | None) -> tuple[dict[str, Any], FileFormat, float]:
    """Return the source's fields for a preset, its format, and the number of all its rows over that of rows read."""
    if os.path.isfile(name):
        form = wanted or chosen_format(Path(name))
        return {"kind": "file", "path": name, "format": form}, form, 1.0
    if not HUB_ID.fullmatch(name):
        raise UserError(f"data {name!r} is no file and no hub id (owner/name)")
    rows = _hub_stream(name)
    columns = list(next(iter(rows), {}))
    form = next(iter(formats_in(columns)), "text")
    if form not in ("messages", "conversations"):
        named = ", ".join(columns) or "none"
        raise UserError(f"dataset {name} has the columns {named}; messages or conversations is needed, or a file")
    splits = rows.info.splits or {}
    total = splits["train"].num_examples if "train" in splits else 0
    return {"kind": "hub", "id": name}, form, max(1.0, (total or 0) / _HUB_ROWS)


def _chats(source: dict[str, Any], form: FileFormat, max_chars: int | None = None) -> tuple[Iterator[Chat], Tally]:
    tally = Tally(form, unit="row")
    if source["kind"] == "file":
        return usable_chats(file_rows(Path(source["path"]), tally), source["path"], tally, max_chars), tally
    return usable_chats(
        enumerate(islice(_hub_stream(source["id"]), _HUB_ROWS), 1), source["id"], tally, max_chars
    ), tally


def _hub_stream(name: str) -> Any:
    """Open the train split of a dataset of the hub as a stream of rows (datasets.IterableDataset)."""
    # The datasets library reads a folder of this name before it asks the hub.
    if not os.path.isdir(name):
        try:
            look_up(WantedRepository("dataset", name, "main"))
        except UserError as error:
            raise UserError(f"{error}; the path of a local file works without the hub") from error
    import datasets

    try:
        return datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"dataset {name} can't be read from the hub: {reason}") from error


def _limit(chars: list[int], tokens: list[float], lengths: array[int], max_length: int) -> int:
    """Return the number of characters up to which every example fits the model; a sample makes this an estimate."""
    too_long = [length for length, count in zip(chars, tokens, strict=True) if count > max_length]
    limit = min(too_long) - 1 if too_long else max(lengths)
    if len(lengths) > len(chars):
        # Only the longer half counts, since the template's tokens dominate short examples.
        median = statistics.median(chars)
        densest = max(count / length for length, count in zip(chars, tokens, strict=True) if length >= median)
        limit = min(limit, int(_MARGIN * max_length / densest))
    return limit


def examine_problems(model: UserModel, name: str, grader: str) -> tuple[UserProblems, str | None]:
    """Examine a file of problems for a model; return them, and a `chat_template` as `examine` does."""
    if grader not in _RESPONSE_TOKENS:
        raise UserError(f"grader {grader!r}: allowed: {', '.join(_RESPONSE_TOKENS)}")
    if not os.path.isfile(name):
        raise UserError(f"problems {name!r} is no file; sets of the hub are named in a preset, such as `kind: gsm8k`")
    room = model.max_length or 10**9
    response = min(_RESPONSE_TOKENS[grader], room // 2)
    chars = min(_MOST_CHARS, max(32, _FEWEST_CHARS_PER_TOKEN * (room - response - _TEMPLATE_TOKENS)))
    source = {"kind": "file", "path": name, "grader": grader, "max_chars": chars}
    _, tally = file_problems(FileProblems.model_validate(source | dict.fromkeys(("train", "validation", "test"), 1)))
    return UserProblems(name, source, tally, tally.usable, response), load_tokenizer(model)[1]
