"""Finished adapters: the `adapter_config.json` that PEFT writes. What lies beside it of the run is not read."""

from __future__ import annotations

import re
from pathlib import Path

from lora_advice.adapter_config import AdapterConfig
from lora_advice.audit.config import TrainingConfig, say
from lora_advice.audit.readers.options import Options, record
from lora_advice.foreign import typed

_OTHER_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "layer_replication")
"""Options that alter where LoRA is, or how large, and that a record does not hold."""


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run that made an adapter."""
    lines = dict[str, int]()
    for number, line in enumerate(content.splitlines(), 1):
        if match := re.match(r'\s*"(\w+)"\s*:', line):
            lines.setdefault(match[1], number)
    adapter = typed(AdapterConfig, content, path.name)
    options, findings = Options(adapter.model_dump(exclude_none=True), lines), []
    if isinstance(adapter.target_modules, tuple):
        options.values["target_modules"] = adapter.targets
    if others := [name for name in _OTHER_PATTERNS if options[name]]:
        message = f"{', '.join(others)} of the adapter is not known to the checks, which take its rank and modules"
        findings = [say("not-known", lines.get(others[0]), what=message)]
    return [record(path, "peft", options, findings=findings, method="lora")]
