"""Options of a run by name, from a command line, a file with nested options or a call in Python, and records of them.

Values that are not understood count as not said. Names are written with spaces between them where a format has several
for one thing: the first that has a value counts.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lora_advice.audit.config import TrainingConfig, say
from lora_advice.audit.yaml_lines import LONGEST, load
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level

_MOST_OPTIONS = 200_000

_LARGEST_DATA = 1 << 26
"""Bytes of data that can be counted in time from a slow disk."""
_COUNT = (1, 1e9, "whole numbers")
_NUMBERS = {
    "lr": ("learning rate", 1e-20, 1000, "numbers"),
    "micro_batch": ("batch size of a device", *_COUNT),
    "accumulation": ("number of accumulated batches", *_COUNT),
    "global_batch": ("batch size", *_COUNT),
    "epochs": ("number of epochs", 1e-9, 1e9, "numbers"),
    "rank": ("rank", *_COUNT),
    # That alpha 0 has no effect is another finding.
    "alpha": ("alpha", 0, 1e9, "numbers"),
    "dropout": ("dropout", 0, 1, "numbers"),
}
"""What numbers may be in all frameworks, by the field of a record."""


@cache
def names_of(framework: str) -> dict[str, str]:
    """Return the names that a framework has for the fields of a record: a column of `names.csv`."""
    with Path(__file__).with_name("names.csv").open(encoding="utf-8", newline="") as file:
        return {row["field"]: row[framework] for row in csv.DictReader(file) if row[framework]}


@cache
def defaults() -> dict[str, dict[str, Any]]:
    """Return what the frameworks take where a file says nothing, by class or framework."""
    text = Path(__file__).with_name("defaults.yaml").read_text(encoding="utf-8")
    values: dict[str, dict[str, Any]] = load(text)[0]
    return values


def at(data: Any, key: str) -> Any:
    """Return the value of a mapping at a key, or null of what is none."""
    return data.get(key) if isinstance(data, Mapping) else None


def _number(value: Any) -> float | None:
    """Return a number, also of text such as `2e-4`; null if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def _count(value: Any) -> int | None:
    """Return a whole number above 0, null if it is none."""
    read = _number(value)
    return int(read) if read is not None and read == int(read) and read > 0 else None


def text_of(value: Any) -> str | None:
    """Return text in one line; null of what is empty or a place to fill in, such as `${MODEL}` or `<model>`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    said = " ".join(str(value).split())
    empty = not said.isprintable() or said.lower() in ("", "none", "null", "...") or said.startswith("<")
    return None if empty or any(mark in said for mark in ("${", "{{", "$(")) else said


def _flag(value: Any) -> bool | None:
    """Return whether an option is on; words count as YAML and command lines write them."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "yes", "on", "1")
    return None if value is None else bool(value) and not isinstance(value, Mapping | list)


def _names(value: Any) -> tuple[str, ...] | None:
    """Return the names of a list; a text is one name."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    return tuple(name for item in items if (name := text_of(item)) is not None) or None


_KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("model", "schedule", "optimizer"), text_of),
    **dict.fromkeys(("lr", "steps", "epochs", "alpha", "dropout", "lr_ratio"), _number),
    **dict.fromkeys(("micro_batch", "accumulation", "devices", "group_size", "global_batch", "rank"), _count),
    **dict.fromkeys(("rslora", "dora"), _flag),
    **dict.fromkeys(("targets", "target_parameters", "saved_modules"), _names),
    # With `gaussian` A starts larger, which by the theory `movement` matters in short runs alone.
    "variant": lambda value: None if value == "gaussian" else text_of(value),
}
"""How the value of a field of a record is read."""
_LORA_FIELDS = {
    *("rank", "alpha", "dropout", "rslora", "dora", "lr_ratio", "variant"),
    *("targets", "target_parameters", "saved_modules"),
}


@dataclasses.dataclass
class Options:
    """Values by name. A value that is said but not known, such as that of a variable of the shell, is null."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: dict[str, int] = dataclasses.field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def set(self, name: str, value: Any, line: int | None = None) -> None:
        """Set a value, with the line where it is said."""
        self.values[name] = value
        self.lines.pop(name, None)
        if line is not None:
            self.lines[name] = line

    def update(self, other: Options) -> None:
        """Set all values of other options."""
        for name, value in other.values.items():
            self.set(name, value, other.lines.get(name))

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Set the values of names that are not there, without a line, which marks a default."""
        self.values = {**defaults, **self.values}

    def get(self, names: str) -> Any:
        """Return the value of the first of some names that has one."""
        return next((self.values[name] for name in names.split() if self.values.get(name) is not None), None)

    def has(self, name: str) -> bool:
        """Return whether an option is set to something, or has options below it."""
        return bool(self.values.get(name)) or any(key.startswith(f"{name}.") for key in self.values)

    def number(self, names: str) -> float | None:
        """Return a number."""
        return _number(self.get(names))

    def count(self, names: str) -> int | None:
        """Return a whole number above 0."""
        return _count(self.get(names))

    def text(self, names: str) -> str | None:
        """Return a text in one line."""
        return text_of(self.get(names))

    def flag(self, names: str) -> bool | None:
        """Return whether an option is on; null if that is not said."""
        return _flag(self.get(names))

    def names(self, names: str) -> tuple[str, ...] | None:
        """Return a list of names; a text is one name."""
        return _names(self.get(names))

    def line(self, names: str) -> int | None:
        """Return the line of the first of some names that has a value."""
        name = next((name for name in names.split() if self.values.get(name) is not None), "")
        return self.lines.get(name)

    def without_effect(self, names: Sequence[str], reason: str, level: Level) -> list[Finding]:
        """Return the finding that those of some options that are set have no effect, since `reason`."""
        stated = [name for name in names if self.values.get(name)]
        if not stated:
            return []
        value = self.text(stated[0])
        first = stated[0] if value is None else f"{stated[0]}: {value}"
        others = f" (as have {', '.join(stated[1:])})" if stated[1:] else ""
        values = {"first": first, "others": others, "reason": reason}
        return [say("no-options", self.lines.get(stated[0]), level=level, **values)]

    def resolved(self) -> Options:
        """Return options with references such as `${base.dir}` replaced by the values that they name."""
        done: dict[tuple[str, int], Any] = {}

        def resolve(value: Any, depth: int) -> Any:
            if isinstance(value, list):
                return [resolve(item, depth) if isinstance(item, str) else item for item in value]
            if not isinstance(value, str) or "${" not in value or depth > 8:
                return value
            if (value, depth) not in done:
                if whole := re.fullmatch(r"\$\{([\w.]+)\}", value):
                    named = self.values.get(whole[1])
                    said = value if named is None or isinstance(named, list) else resolve(named, depth + 1)
                else:
                    said = re.sub(r"\$\{[\w.]+\}", lambda reference: str(resolve(reference[0], depth + 1)), value)
                # References to references can be of exponential size.
                done[value, depth] = said if len(str(said)) <= LONGEST else value
            return done[value, depth]

        return Options({name: resolve(value, 0) for name, value in self.values.items()}, self.lines)


def read_yaml(content: str, *, as_omegaconf: bool = False) -> Options:
    """Return the options of a YAML file by dotted name, in which a list is a value.

    Raises:
        UserError: it is not valid, no mapping, or has too many options, such as by aliases of aliases.
    """
    data, lines = load(content, as_omegaconf=as_omegaconf)
    if not isinstance(data, dict):
        raise UserError("it has no options: it is not a mapping")
    flat: dict[str, Any] = {}

    def flatten(data: Mapping[Any, Any], prefix: str) -> None:
        for key, value in data.items():
            if isinstance(value, Mapping):
                flatten(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value
            if len(flat) > _MOST_OPTIONS:
                raise UserError(f"it has more than {_MOST_OPTIONS:,} options")

    flatten(data, "")
    return Options(flat, lines)


def record(
    shown: str,
    file_format: str,
    options: Options,
    keys: Mapping[str, str],
    findings: Sequence[Finding] = (),
    *,
    name: str = "",
    lora: bool = True,
    **said: Any,
) -> TrainingConfig:
    """Return the record of a run, in which numbers without meaning, such as rank 0, are findings and no values.

    Args:
        keys: the names that the format has for the fields of a record.
        lora: whether the fields of LoRA count, if the method is not full fine-tuning.
        said: further fields, and those that are not what their options say.
    """
    fields = {field: kind(options.get(keys[field])) for field, kind in _KINDS.items() if field in keys} | said
    left_out = _LORA_FIELDS if not lora or fields.get("method") == "fullft" else ()
    fields = {field: value for field, value in fields.items() if value is not None and field not in left_out}
    if "accumulation" not in fields and any(name in options for name in keys.get("accumulation", "").split()):
        fields.pop("micro_batch", None)  # the batch is not known if a factor of it is not
    lines = {field: line for field in fields if (line := options.line(keys.get(field, ""))) is not None}
    unused = {"epochs"} if fields.get("steps", 0) > 0 else set()
    if fields.get("method") != "lora":
        unused |= _LORA_FIELDS
    wrong = list[Finding]()
    for field, (noun, low, high, kind) in _NUMBERS.items():
        value = options.get(keys.get(field, ""))
        if field in unused or isinstance(value, bool):
            continue
        try:
            allowed = low <= float(value) <= high and (kind == "numbers" or float(value) % 1 == 0)
        except (TypeError, ValueError):  # it is no number at all, which is not said or another finding
            continue
        except OverflowError:
            allowed = False
        if not allowed:
            values = {"noun": noun, "value": f"{value!s:.40}", "kind": kind, "low": low, "high": high}
            wrong.append(say("number", options.line(keys[field]), **values))
            fields.pop(field, None)
    return TrainingConfig(shown, file_format, name, lines=lines, findings=(*findings, *wrong), **fields)


def examples(config: Path, files: Any) -> int | None:
    """Return the number of examples in files of JSON lines that a configuration names.

    Names are seen from the current folder or that of the configuration. Null if a file is of another kind, is not there
    or all are large.
    """
    lines, left = 0, _LARGEST_DATA
    for name in files if isinstance(files, list) else [files]:
        said = text_of(name) or ""
        try:
            file = next((file for file in (Path(said), config.parent / said) if os.path.isfile(file)), None)
            if file is None or file.suffix != ".jsonl" or (left := left - file.stat().st_size) < 0:
                return None
            with file.open("rb") as rows:
                lines += sum(not row.isspace() for row in rows)
        except OSError:
            return None
    return lines or None
