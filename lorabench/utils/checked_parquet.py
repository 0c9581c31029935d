"""Parquet files that reveal damage: a checksum lies between the data and the footer, where other readers skip it.

Parquet itself detects neither a changed byte of a page nor most changes of the footer. Unlike an entry of the metadata,
the checksum is not copied into a file that another program makes of the table. Hashing takes two to three seconds a GB.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

from lorabench.errors import UserError

_MARK = b"\xfflorabench\xffseal\xff"
"""Stands before and after the checksum, so that a flipped bit in one of them does not hide that there is one. No text
in a table holds it, since it is not valid UTF-8."""
_LENGTH = 2 * len(_MARK) + hashlib.sha256().digest_size
_TAIL = 1 << 20
"""The bytes at the end of a file in which the checksum is looked for; a footer takes about 100 bytes for each column of
each million rows."""


def add_checksum(path: Path) -> None:
    """Add the checksum to a parquet file that was just written."""
    with path.open("r+b") as file:
        # The length of the footer stands before the last four bytes.
        file.seek(-8, os.SEEK_END)
        start = file.tell() - int.from_bytes(file.read(4), "little")
        seal = _seal(file, start, start)
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(seal + footer)


def check_parquet(path: Path) -> None:
    """Raise UserError if a parquet file's content differs from what was written, unless it has no checksum."""
    with path.open("rb") as file:
        tail = max(file.seek(0, os.SEEK_END) - _TAIL, 0)
        file.seek(tail)
        marks = [tail + mark.start() for mark in re.finditer(re.escape(_MARK), file.read())]
        if not marks:
            return
        file.seek(marks[0])
        if file.read(_LENGTH) != _seal(file, marks[0], marks[0] + _LENGTH):
            raise UserError(damaged(path, "its checksum is not that of its content"))


def damaged(path: Path, reason: str) -> str:
    """Return the sentence about a damaged parquet file."""
    return (
        f"{path} is damaged; delete it to have it made again, in a preset's results by `lorabench run PRESET {path}` "
        f"({reason})"
    )


def _seal(file: BinaryIO, start: int, footer: int) -> bytes:
    """Return the marked checksum of all bytes but those from `start` to the footer."""
    file.seek(footer)
    digest = hashlib.sha256(file.read())
    file.seek(0)
    for at in range(0, start, _TAIL):
        digest.update(file.read(min(_TAIL, start - at)))
    return _MARK + digest.digest() + _MARK
