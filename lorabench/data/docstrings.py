"""Python functions with the descriptions that people wrote for them, from a file that is shipped with the package.

The user's turn shows a function without its docstring; the assistant's turn is the docstring's first paragraph. The
splits come from different packages. The file's note names their versions and licences; the script
`workflow/scripts/docstrings.py` wrote it from the installed packages.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from lorabench.config.inputs import DocstringsDataset
from lorabench.data.chat import SPLITS, Chat, Split
from lorabench.errors import UserError
from lorabench.utils.files import file_sha256

FILE = Path(__file__).with_name("docstrings.parquet")
SHA256 = "22dd0b3433784667b6e17e5a206fe870d877e7fc787091a16f6557513e841603"
"""The SHA-256 of the file."""

_QUESTION = "What does this Python function do?"


def choose_docstrings(spec: DocstringsDataset) -> tuple[Iterator[tuple[Split, Chat]], dict[str, Any]]:
    """Choose the examples of each split at random by the spec's seed, from the packages of that split.

    Returns:
        The examples with their splits, and a note: the packages and their licences, the number of functions in the
        files that were parsed, the number of usable ones, and what was left out by reason.

    Raises:
        UserError: the file was changed, or a split's packages have too few usable functions.
    """
    if file_sha256(FILE) != SHA256:
        raise UserError(f"{FILE} was changed after it was installed; install the package again")
    table = pq.read_table(FILE)
    note = json.loads(table.schema.metadata[b"lorabench"])
    before, chats = note.pop("left_out"), []
    left_out = {"of too few words": before.pop("of too few words"), "too long": before.pop("too long"), **before}
    for row in table.to_pylist():
        chat = Chat.of(row["package"], f"{_QUESTION}\n\n{row['code']}", row["description"])
        if row["words"] < spec.min_words:
            left_out["of too few words"] += 1
        elif chat.chars() > spec.max_chars:
            left_out["too long"] += 1
        else:
            chats.append((row["split"], chat, row["code"]))
    usable = list(_distinct(chats, left_out))
    chosen: list[tuple[Split, Chat]] = []
    for split in SPLITS:
        pool = [chat for name, chat in usable if name == split]
        wanted = getattr(spec, split)
        if len(pool) < wanted:
            raise UserError(
                f"found {len(pool)} {split} examples of at most {spec.max_chars} characters and at least "
                f"{spec.min_words} words in the docstrings; {wanted} are needed"
            )
        Random(spec.seed).shuffle(pool)
        chosen += [(split, chat) for chat in pool[:wanted]]
    counts = {"rows": len(usable) + sum(left_out.values()), "usable": len(usable), "left_out": left_out}
    return iter(chosen), note | counts


def _distinct(chats: list[tuple[Split, Chat, str]], left_out: dict[str, int]) -> Iterator[tuple[Split, Chat]]:
    """Yield the chats whose description no other has, each code once; count the others.

    Descriptions are compared without the names in backticks, code without the function's name: both by letters alone.
    """
    same_text, same_code = "shares its description with another function", "repeats the code of another function"
    left_out |= {same_text: 0, same_code: 0}
    texts = [_letters(re.sub(r"`[^`]*`", "", chat.messages[1]["content"])) for _, chat, _ in chats]
    counts, seen = Counter(texts), set[str]()
    for (split, chat, code), text in zip(chats, texts, strict=True):
        letters = _letters(re.sub(r"def \w+", "def", code, count=1))
        if counts[text] > 1:
            left_out[same_text] += 1
        elif letters in seen:
            left_out[same_code] += 1
        else:
            seen.add(letters)
            yield split, chat


def _letters(text: str) -> str:
    return "".join(re.findall(r"[a-z]+", text.lower()))
