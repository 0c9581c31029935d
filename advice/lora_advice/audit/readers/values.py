"""The values of options as frameworks take them: what is not understood is null, which counts as not said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def at(data: Any, key: str) -> Any:
    """Return the value of a mapping at a key, or null of what is none."""
    return data.get(key) if isinstance(data, Mapping) else None


def number(value: Any) -> float | None:
    """Return a number, also of text such as `2e-4`; null if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def count(value: Any) -> int | None:
    """Return a whole number above 0, null if it is none."""
    read = number(value)
    return int(read) if read is not None and read == int(read) and read > 0 else None


def text(value: Any) -> str | None:
    """Return text in one line; null of what is empty or a place to fill in, such as `${MODEL}` or `<model>`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    said = " ".join(str(value).split())
    empty = not said.isprintable() or said.lower() in ("", "none", "null", "...") or said.startswith("<")
    return None if empty or any(mark in said for mark in ("${", "{{", "$(")) else said


def flag(value: Any) -> bool | None:
    """Return whether an option is on, null if it is not said; words count as YAML and command lines write them."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "yes", "on", "1")
    return None if value is None else bool(value) and not isinstance(value, Mapping | list)


def names(value: Any) -> tuple[str, ...] | None:
    """Return the names of a list; a text is one name."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list | tuple | set) else []
    return tuple(name for item in items if (name := text(item)) is not None) or None
