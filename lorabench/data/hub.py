"""Chats from a dataset of the Hugging Face hub, in the two forms that Tulu3 and OpenThoughts3 have.

    allenai/tulu-3-sft-mixture     id: string, messages: [{content: string, role: string}], source: string
    open-thoughts/OpenThoughts3-1.2M
                                   difficulty: int64, source: string, domain: string,
                                   conversations: [{from: string, value: string}]

The files are gone through twice, a batch of rows at a time: first to see what is usable and to choose, then to read
what was chosen. Of a row, eight bytes of its prompt's hash are kept between the two.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorabench.config import HubDataset
from lorabench.data.chat import SPLITS, Chat, Messages, Split, prompt_digest
from lorabench.data.rows import local_files, read_rows
from lorabench.errors import UserError
from lorabench.hub import Fetched, Wanted

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_FORMS = ("messages", "conversations")


def repository(spec: HubDataset) -> Wanted:
    """What has to be fetched for a dataset."""
    return Wanted("dataset", spec.id, spec.revision, ((spec.config, spec.split),))


def part_files(
    fetched: Mapping[str, Fetched], copies: str | None, name: str, config: str | None, split: str
) -> list[Path]:
    """The files of a part of a dataset: in the hub's cache, or in a folder with copies of repositories.

    Raises:
        UserError: they are not there.
    """
    if copies is not None:
        return local_files(Path(copies, name, config or ""), split)
    return fetched[name].data_files(config, split)


@dataclass(frozen=True)
class HubChats:
    """What a dataset's spec chooses: the split of each row as its place in SPLITS, or -1; and how it came to it."""

    files: list[Path]
    spec: HubDataset
    splits: np.ndarray
    about: dict[str, Any]

    def __iter__(self) -> Iterator[tuple[Split, Chat]]:
        """The chosen chats with their split, in the order of the files."""
        for place, chat in zip(self.splits, _chats(self.spec, self.files), strict=True):
            if place >= 0:
                yield SPLITS[place], chat


def choose_chats(spec: HubDataset, fetched: Mapping[str, Fetched]) -> HubChats:
    """Choose as many rows as the spec asks for, at random by its seed; each prompt once, so that splits share none.

    What is held out is taken first, so that it does not depend on how much is trained on.

    Raises:
        UserError: the files are not there, have other columns or roles, or hold too few usable rows.
    """
    files = part_files(fetched, spec.path, spec.id, spec.config, spec.split)
    left_out: Counter[str] = Counter()
    numbers, digests, rows = array("q"), array("Q"), 0
    for rows, chat in enumerate(_chats(spec, files), 1):
        reason = _unusable(chat, spec.max_chars)
        if reason:
            left_out[reason] += 1
        else:
            numbers.append(rows - 1)
            digests.append(prompt_digest(chat.messages))
    order = np.random.default_rng(spec.seed).permutation(len(numbers))
    _, first = np.unique(np.asarray(digests)[order], return_index=True)
    left_out["with the prompt of another"] = len(numbers) - len(first)
    wanted = {split: int(getattr(spec, split)) for split in SPLITS}
    if len(first) < sum(wanted.values()):
        asked = ", ".join(f"{count} {split}" for split, count in wanted.items())
        raise UserError(
            f"dataset {spec.id} has {len(first)} usable examples of {rows}; {sum(wanted.values())} are asked for "
            f"({asked}); left out: {', '.join(f'{count} {reason}' for reason, count in left_out.items())}"
        )
    shuffled = np.asarray(numbers)[order[np.sort(first)]]
    splits, start = np.full(rows, -1, np.int8), 0
    for split in reversed(SPLITS):
        splits[shuffled[start : start + wanted[split]]] = SPLITS.index(split)
        start += wanted[split]
    commit = fetched[spec.id].commit if spec.path is None else None
    about = {"id": spec.id, "commit": commit, "rows": rows, "usable": len(first), "left_out": dict(left_out)}
    return HubChats(files, spec, splits, about)


def _unusable(chat: Chat, max_chars: int) -> str | None:
    """Why a chat is left out; None if it is not."""
    messages = chat.messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return "without a last answer"
    return f"of more than {max_chars} characters" if chat.chars() > max_chars else None


def _chats(spec: HubDataset, files: list[Path]) -> Iterator[Chat]:
    """The chat of each row."""

    def columns(names: Collection[str], where: str) -> list[str]:
        form = next((name for name in _FORMS if name in names), None)
        if form is None:
            raise UserError(
                f"dataset {spec.id} has the columns {', '.join(names)} in {where}; messages or conversations is needed"
            )
        return [form, "source"] if "source" in names else [form]

    for row in read_rows(files, columns):
        yield Chat(str(row.get("source") or spec.id), to_messages(row, spec.id))


def to_messages(row: dict[str, Any], name: str) -> Messages:
    """A row's chat as role and content: from `messages` (role, content) or `conversations` (from, value).

    Raises:
        UserError: a turn of another form, a role that is not known, or a turn without text.
    """
    form = next(form for form in _FORMS if form in row)
    role_key, content_key = ("role", "content") if form == "messages" else ("from", "value")
    messages = []
    for turn in row[form] or []:
        if role_key not in turn or content_key not in turn:
            raise UserError(
                f"dataset {name} has a turn of {form} with {', '.join(turn)}; {role_key} and {content_key} are needed"
            )
        role, content = turn[role_key], turn[content_key]
        if role not in _ROLES:
            raise UserError(f"dataset {name} has a turn of role {role!r}; allowed: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"dataset {name} has a turn of {role} without text")
        messages.append({"role": _ROLES[role], "content": content})
    return messages
