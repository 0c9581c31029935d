"""Options as Hydra and OmegaConf give them: overrides on a command line over a YAML file with nested options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lora_advice.audit.readers.flat import Options, flatten
from lora_advice.audit.readers.shell import Word, known
from lora_advice.audit.yaml_lines import load, resolve
from lora_advice.errors import UserError

_OVERRIDE = re.compile(r"[+]{0,2}([A-Za-z_][\w@/-]*(?:\.[\w@/-]+)*)=(.*)", re.DOTALL)


def read_yaml(text: str) -> Options:
    """Return the options of a YAML file by dotted name."""
    data, lines = load(text, as_omegaconf=True)
    if not isinstance(data, dict):
        raise UserError("it has no options: it is not a mapping")
    return Options(flatten(data), dict(lines))


def read_overrides(words: Sequence[Word]) -> Options:
    """Return the options that a command sets as `name=value`, `+name=value` or `++name=value`."""
    options = Options()
    for word in words:
        if match := _OVERRIDE.fullmatch(word.text):
            options.set(match[1], _value(match[2]), word.line)
    return options


def _value(word: str) -> Any:
    text = known(word)
    if text is None or text.lower() == "null":
        return None
    if text.startswith("[") and text.endswith("]"):
        return [item.strip().strip("'\"") for item in text[1:-1].split(",") if item.strip()]
    return text.strip("'\"")


def resolved(options: Options) -> Options:
    """Return options with references such as `${policy.precision}` replaced by the values that they name."""
    nested: dict[str, Any] = {}
    for name, value in options.values.items():
        *folders, last = name.split(".")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                return options
        node[last] = value
    return Options(flatten(resolve(nested)), options.lines)
