"""Chats from a dataset of the Hugging Face hub, in the two forms that Tulu3 and OpenThoughts3 have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lorabench.config import HubDataset
from lorabench.data.chat import Chat, Messages
from lorabench.errors import UserError

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def hub_rows(name: str, config: str | None, split: str, revision: str) -> Any:
    """A split of a dataset of the hub, memory-mapped (a datasets.Dataset).

    Raises:
        UserError: it can't be fetched.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, name=config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(f"dataset {name} can't be loaded: {str(error).strip().splitlines()[0]}") from error


def hub_chats(spec: HubDataset) -> Iterator[Chat]:
    """The chat of each row, in an order that the seed decides; the dataset is memory-mapped, not loaded.

    Raises:
        UserError: it can't be fetched, or its rows are no chats.
    """
    rows = hub_rows(spec.id, spec.config, spec.split, spec.revision)
    if not {"messages", "conversations"} & set(rows.column_names):
        columns = ", ".join(rows.column_names)
        raise UserError(f"dataset {spec.id} has the columns {columns}; messages or conversations is needed")
    for row in rows.shuffle(seed=spec.seed):
        yield Chat(str(row.get("source") or spec.id), to_messages(row, spec.id))


def to_messages(row: dict[str, Any], name: str) -> Messages:
    """A row's chat as role and content: from `messages` (role, content) or `conversations` (from, value).

    Raises:
        UserError: a role that is not known, or a turn without text.
    """
    turns = row.get("messages") or row.get("conversations") or []
    messages = []
    for turn in turns:
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
        if role not in ROLES:
            raise UserError(f"dataset {name} has a turn of role {role!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"dataset {name} has a turn of {role} without text")
        messages.append({"role": ROLES[role], "content": content})
    return messages
