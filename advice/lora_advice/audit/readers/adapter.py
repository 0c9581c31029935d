"""Finished adapters: the `adapter_config.json` that PEFT writes. What lies beside it of the run is not read."""

from __future__ import annotations

import re
from pathlib import Path

from lora_advice.adapter_config import NAME, OtherMethodError, parse_adapter
from lora_advice.audit.config import TrainingConfig, say
from lora_advice.audit.readers.options import Options, names_of, record

_OTHER_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "layer_replication")
"""Options that alter where LoRA is, or how large, and that a record does not hold."""


def matches(path: Path, text: str) -> bool:
    """Return whether a file is the configuration of an adapter."""
    return path.name == NAME


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run that made an adapter."""
    lines = dict[str, int]()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r'\s*"(\w+)"\s*:', line):
            lines.setdefault(match[1], number)
    try:
        adapter = parse_adapter(text, path.name)
    except OtherMethodError as error:
        options, message, about = Options(), f"{error}, so no check is about it", "peft_type"
    else:
        options, message, about = Options(adapter.model_dump(exclude_none=True), lines), "", ""
        if isinstance(adapter.target_modules, tuple):
            options.values["target_modules"] = adapter.targets
        if others := [name for name in _OTHER_PATTERNS if options.get(name)]:
            message = f"{', '.join(others)} of the adapter is not known to the checks, which take its rank and modules"
            about = others[0]
    findings = [say("not-known", lines.get(about), what=message)] if message else []
    method = "lora" if options.values else None
    return [record(shown, "peft", options, names_of("peft"), findings, method=method)]
