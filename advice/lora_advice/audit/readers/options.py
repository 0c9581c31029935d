"""Values of options as files state them: what is not understood counts as not said."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_advice.audit.config import TrainingConfig
from lora_advice.finding import Finding, Level

THE_FILE = "the file alone"
CERTAIN = "certain"
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


def at(data: Any, key: str) -> Any:
    """Return the value at a dotted key such as `optimizer.lr`, or null."""
    for part in key.split("."):
        if not isinstance(data, Mapping):
            return None
        data = data.get(part)
    return data


def number(value: Any) -> float | None:
    """Return a number, also of text such as `2e-4`; null if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def whole(value: Any) -> int | None:
    """Return a whole number, null if it is none."""
    read = number(value)
    return int(read) if read is not None and read == int(read) else None


def count(value: Any) -> int | None:
    """Return a whole number above 0, null if it is none."""
    read = whole(value)
    return read if read is not None and read > 0 else None


def text(value: Any) -> str | None:
    """Return text in one line that is not empty and has no place to fill in, such as `${MODEL}` or `{{ model }}`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    said = " ".join(str(value).split())
    return said if said and said.isprintable() and not any(mark in said for mark in ("${", "{{", "$(")) else None


def variant_of(initialization: str | None) -> str | None:
    """Return the variant of LoRA that PEFT's `init_lora_weights` names; null for LoRA, as which `gaussian` counts.

    A then starts larger, which by the theory `movement` matters in short runs alone (docs/audit-codes.md, lr).
    """
    return None if initialization == "gaussian" else initialization


def flag(value: Any) -> bool:
    """Return whether an option is on; words count as YAML and command lines write them."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "yes", "on", "1")
    return bool(value) and not isinstance(value, Mapping | list)


def names(value: Any) -> tuple[str, ...] | None:
    """Return the names of a list or of a text with commas; null if there is none."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple):
        return None
    said = (text(name) for name in value)
    return tuple(name for name in said if name is not None) or None


def examples(config: Path, files: Any) -> int | None:
    """Return the number of examples in files of JSON lines that a configuration names.

    Names are seen from the current folder or that of the configuration. Null if a file is of another kind, is not there
    or all are large.
    """
    lines, left = 0, _LARGEST_DATA
    for name in files if isinstance(files, list) else [files]:
        said = text(name) or ""
        try:
            file = next((file for file in (Path(said), config.parent / said) if os.path.isfile(file)), None)
            if file is None or file.suffix != ".jsonl" or (left := left - file.stat().st_size) < 0:
                return None
            with file.open("rb") as rows:
                lines += sum(not row.isspace() for row in rows)
        except OSError:
            return None
    return lines or None


def lines_of(keys: Mapping[str, str], lines: Mapping[str, int]) -> dict[str, int]:
    """Return the lines of fields of a record, from the keys under which a format has them."""
    return {name: lines[key] for name, key in keys.items() if key in lines}


def lr_findings(value: Any, key: str, line: int | None, framework: str) -> list[Finding]:
    """Return what a learning rate as PyYAML reads it calls for, in a framework that makes text a number itself."""
    if not isinstance(value, str) or text(value) is None:
        return []
    if number(value) is None:
        message = f"{key}: {value!r} is no number, so {framework} cannot start"
        return [Finding("lr-text", "error", message, THE_FILE, CERTAIN, line=line)]
    message = (
        f"YAML reads {key}: {value} as text, since it has no dot or its exponent no sign; {framework} makes it a "
        f"number, and other programs may not: {dotted(number(value) or 0.0)} is a number to all of them"
    )
    return [Finding("lr-text", "note", message, THE_FILE, CERTAIN, line=line)]


def checked(config: TrainingConfig, said: Mapping[str, Any]) -> TrainingConfig:
    """Return a record in which numbers without meaning, such as rank 0, are findings and no values.

    Args:
        config: the record.
        said: what the file says, by field.
    """
    findings, without = list[Finding](), dict[str, None]()
    unused = ["epochs"] if (config.steps or 0) > 0 else []
    unused += ["rank", "alpha", "dropout"] if config.method != "lora" else []
    for field, (name, low, high, kind) in _NUMBERS.items():
        value = said.get(field)
        if field in unused or isinstance(value, bool):
            continue
        try:
            allowed = low <= float(value) <= high and (kind == "numbers" or float(value) % 1 == 0)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # it is no number at all, which is not said or another finding
            continue
        except OverflowError:
            allowed = False
        if not allowed:
            message = f"the {name} is {value!s:.40}; allowed: {kind} from {low:g} to {high:g}"
            findings.append(Finding("number", "error", message, THE_FILE, CERTAIN, line=config.line(field)))
            without[field] = None
    return replace(config, findings=(*config.findings, *findings), **without)  # type: ignore[arg-type]


def dotted(value: float) -> str:
    """Return a number as YAML 1.1 reads it: with a dot and a signed exponent."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa)}e{exponent[0]}{int(exponent[1:])}"


def without_effect(
    data: Mapping[str, Any], keys: Sequence[str], reason: str, level: Level, lines: Mapping[str, int]
) -> Finding:
    """Return the finding that some options have no effect.

    Args:
        keys: the options, of which the first is in the message with its value.
        reason: why they have none, after "since".
    """
    value = text(data.get(keys[0]))
    first = keys[0] if value is None else f"{keys[0]}: {value}"
    others = f" (as have {', '.join(keys[1:])})" if keys[1:] else ""
    message = f"{first} has no effect{others}, since {reason}"
    return Finding("no-effect", level, message, THE_FILE, CERTAIN, line=lines.get(keys[0]))


def repeated_findings(repeated: tuple[str, ...], lines: Mapping[str, int], effect: str) -> list[Finding]:
    """Return a finding for each key that a mapping has more than once; `effect` says what the framework does."""
    return [
        Finding("repeated", "warning", f"{key} is set more than once: {effect}", THE_FILE, CERTAIN, line=lines.get(key))
        for key in repeated
    ]
