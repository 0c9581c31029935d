"""A user's dataset or problems, examined before use: the format, usable and unusable rows, and numbers of tokens."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from lorabench.config.fields import FileFormat
from lorabench.config.inputs import FileProblems, HubModel
from lorabench.custom.model import HUB_ID, UserModel
from lorabench.data.chat import FORMATS, is_text
from lorabench.data.files import TOO_LONG, RawRow, Tally, chosen_format, file_problems, file_rows, usable_chats
from lorabench.data.tokens import encode_chat
from lorabench.errors import UserError
from lorabench.models.specs import template_text
from lorabench.utils.hub import WantedRepository, look_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# At most this many examples are tokenized; a larger dataset is judged by a random sample of this size.
_SAMPLE = 2000
# At most this many rows of a dataset of the hub are read.
_HUB_ROWS = 5_000
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
class UserData:
    """A user's dataset or file of problems."""

    name: str  # The path or id that the user gave.
    source: dict[str, Any]  # The fields by which a preset names it, such as kind, and path or id.
    tally: Tally
    usable: int
    """The number of distinct usable examples; for a large dataset of the hub, estimated from its first rows."""
    about: str  # What else to say of it, for a person.
    mean_completion_tokens: float | None = None  # The mean number of scored tokens of an example; None for problems.
    max_new_tokens: int | None = None
    """The longest response in tokens that leaves room for a problem; None for a dataset."""

    def __str__(self) -> str:
        return f"{self.name}: {self.tally}{self.about}"


def load_tokenizer(model: UserModel) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Return the model's tokenizer, and the `chat_template` that it is given if it has none of its own.

    The tokenizer is None for a model of the hub that is not on this machine; UserError if a local model has none.
    """
    from lorabench.models import base

    spec = model.spec
    try:
        tokenizer = base.load_tokenizer(spec)
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
    if form is not None and form not in FORMATS:
        raise UserError(f"format {form!r}: allowed: {', '.join(FORMATS)}")
    source: dict[str, Any]
    rows: Iterable[RawRow]
    if os.path.isfile(name):
        form, rows, of_all = form or chosen_format(Path(name)), file_rows(Path(name)), 1.0
        source = {"kind": "file", "path": name, "format": form}
    else:
        form, rows, of_all = _hub_rows(name)
        source = {"kind": "hub", "id": name}
    tally = Tally(form)
    chats = list(usable_chats(rows, name, tally))
    if not chats:
        raise UserError(f"{name}: {tally}")
    sample = Random(0).sample([chat for _, chat in chats], min(_SAMPLE, len(chats)))
    # The numbers of characters, of all tokens and of scored tokens of each example in the sample.
    counts: list[tuple[int, float, float]] = []
    for chat in sample:
        if tokenizer is not None:
            ids, mask = encode_chat(tokenizer, chat.messages)
            counts.append((chat.chars(), len(ids), sum(mask)))
        else:
            scored_chars = chat.chars() if is_text(chat.messages) else len(chat.messages[-1]["content"])
            counts.append((chat.chars(), chat.chars() / _CHARS_PER_TOKEN, scored_chars / _CHARS_PER_TOKEN))
    if model.max_length is not None:
        limit = min((chars for chars, tokens, _ in counts if tokens > model.max_length), default=10**9) - 1
        if len(chats) > len(sample):
            # Only the longer half counts, since the template's tokens dominate short examples.
            median = statistics.median(chars for chars, _, _ in counts)
            densest = max(tokens / chars for chars, tokens, _ in counts if chars >= median)
            limit = min(limit, int(_MARGIN * model.max_length / densest))
        for number, chat in chats:
            if chat.chars() > limit:
                tally.leave_out(number, TOO_LONG)
                tally.usable -= 1
        chats = [(number, chat) for number, chat in chats if chat.chars() <= limit]
    if not chats:
        raise UserError(f"{name}: no example fits the {model.max_length} tokens that the model takes")
    longest = max(chat.chars() for _, chat in chats)
    # If the whole sample is too long, its means are the only estimate.
    kept = [entry for entry in counts if entry[0] <= longest] or counts
    _, mean, scored = (statistics.fmean(column) for column in zip(*kept, strict=True))
    guess = f" (a guess: {_CHARS_PER_TOKEN:g} characters per token)" if tokenizer is None else ""
    about = f"\nabout {mean:.0f} tokens per example, {scored:.0f} of them scored{guess}"
    source |= {"max_chars": max(32, longest), "mean_tokens": max(1, round(mean))}
    return UserData(name, source, tally, int(tally.usable * of_all), about, scored), template


def _hub_rows(name: str) -> tuple[FileFormat, Iterator[RawRow], float]:
    """Return the format and the first rows of a dataset of the hub, and its number of rows over that of these."""
    if not HUB_ID.fullmatch(name):
        raise UserError(f"data {name!r} is no file and no hub id (owner/name)")
    # The datasets library reads a folder of this name before it asks the hub.
    if not os.path.isdir(name):
        look_up(WantedRepository("dataset", name, "main"))
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"dataset {name} can't be read from the hub: {reason}") from error
    columns = list(next(iter(rows), {}))
    form: FileFormat = "messages" if "messages" in columns else "conversations"
    if form not in columns:
        named = ", ".join(columns) or "none"
        raise UserError(f"dataset {name} has the columns {named}; messages or conversations is needed, or a file")
    splits = rows.info.splits or {}
    total = splits["train"].num_examples if "train" in splits else 0
    return form, islice(rows, _HUB_ROWS), max(1.0, (total or 0) / _HUB_ROWS)


def examine_problems(model: UserModel, name: str, grader: str) -> tuple[UserData, str | None]:
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
    about = f"; responses of at most {response} tokens"
    return UserData(name, source, tally, tally.usable, about, max_new_tokens=response), load_tokenizer(model)[1]
