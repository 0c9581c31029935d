"""Options of a run by name, from a command line, a nested file with dotted names, or a call in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_advice.audit.readers import options
from lora_advice.errors import UserError

_MOST = 200_000


@dataclass
class Options:
    """Values by name. A value that is said but not known, such as that of a variable of the shell, is null."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def set(self, name: str, value: Any, line: int | None = None) -> None:
        self.values[name] = value
        self.lines.pop(name, None)
        if line is not None:
            self.lines[name] = line

    def update(self, other: Options) -> None:
        for name, value in other.values.items():
            self.set(name, value, other.lines.get(name))

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Set the values of names that are not there."""
        self.values = {**defaults, **self.values}

    def get(self, *names: str) -> Any:
        """Return the value of the first of some names that has one."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def number(self, *names: str) -> float | None:
        return options.number(self.get(*names))

    def count(self, *names: str) -> int | None:
        return options.count(self.get(*names))

    def text(self, *names: str) -> str | None:
        """Return a text; null for a place to fill in, such as `<model>`."""
        value = options.text(self.get(*names))
        empty = value is None or value.lower() in ("none", "null", "...") or value.startswith("<")
        return None if empty else value

    def flag(self, *names: str) -> bool | None:
        """Return whether an option is on; null if that is not said."""
        value = self.get(*names)
        return None if value is None else options.flag(value)

    def names(self, *names: str) -> tuple[str, ...] | None:
        """Return a list of names; a text is one name."""
        value = self.get(*names)
        if isinstance(value, str):
            return (value,) if self.text(*names) else None
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            return None
        return tuple(value)

    def said(self, keys: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        """Return the values of fields of a record as they are said, from the names under which a format has them."""
        return {field: self.get(*names) for field, names in keys.items()}

    def lines_of(self, keys: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
        """Return the lines of fields of a record, from the names under which a format has them."""
        found = {
            field: next((name for name in names if self.get(name) is not None), "") for field, names in keys.items()
        }
        return {field: self.lines[name] for field, name in found.items() if name in self.lines}


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted name; a list is a value."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
        if len(flat) > _MOST:  # aliases of aliases
            raise UserError(f"it has more than {_MOST:,} options")
    return flat
