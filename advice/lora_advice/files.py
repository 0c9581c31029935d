"""Files that are written whole or not at all, and by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_advice.errors import UserError


def write_text(text: str, path: Path) -> None:
    """Write a text, whole or not at all; raises UserError if the path is no regular file, such as a device."""
    if os.path.exists(path) and not os.path.isfile(path):
        # As root, a device would be replaced.
        raise UserError(f"{path} can't be written: it exists and is no regular file")
    partial = path.with_name(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                # A power cut must not leave the name without the content.
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file inside the `with` block, after those that hold it now; raises UserError if there are no locks.

    The kernel releases the lock of a process that dies. The file stays, since others may wait for it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise UserError(f"{path} can't be locked: {error.strerror}") from error
    with file:
        yield
