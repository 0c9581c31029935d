"""Files that are written whole or not at all."""

from __future__ import annotations

import os
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
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error
