"""prime-rl: TOML of its RL, of its SFT, and of the trainer of its RL alone, which has no batch size."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Task, TrainingConfig
from lora_advice.audit.readers.options import Options, count, frameworks, record, text
from lora_advice.errors import UserError


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    try:
        options = Options(dict(_flat(tomllib.loads(content), "")), _lines(content))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"it is not valid TOML: {error}") from error
    table = frameworks()["prime_rl"]
    rl, sft = (
        any(re.match(start, name) for name in options.values) for start in (r"trainer\.|orchestrator\.", r"data\.\w+$")
    )
    if not rl and not options.has("optim") and not options.has("model.lora"):
        return []
    task: Task | None = "rl" if rl else "sft" if sft else None
    trainer = "trainer." if rl else ""
    keys = {field: f"{trainer}{name}" for field, name in table["trainer_names"].items()}
    keys |= table["rl_names" if rl else "sft_names"]
    # In its first versions LoRA was an experiment.
    keys |= {field: f"{keys[field]} {keys[field].replace('model.', 'model.experimental.')}" for field in table["lora"]}
    lora, offload = (
        any(
            re.match(rf"{trainer}model\.{part}(\.|$)", name) and value is not False
            for name, value in options.values.items()
        )
        for part in (r"(experimental\.)?lora", "full_offload")
    )
    for field, value in table["defaults"].items():
        if (lora or field not in table["lora"]) and options[keys[field]] is None:
            options.values[keys[field].split()[0]] = value
    group = count(options[keys.get("group_size", "")]) or 1
    batch = count(options[keys["global_batch"]])
    return [
        record(
            path,
            "prime_rl",
            options,
            keys,
            task=task,
            method="lora" if lora else "fullft",
            # A full offload holds an fp32 copy.
            rounded=text(options[keys["rounded"]]) == "bfloat16" and not offload,
            # A batch counts responses.
            group_size=group if rl else None,
            global_batch=None if batch is None or batch % group else batch // group,
        )
    ]


def _flat(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(content: str) -> dict[str, int]:
    """Return the lines of keys by dotted name, of tables that stand under a heading of their own."""
    lines, prefix = dict[str, int](), ""
    for number, line in enumerate(content.splitlines(), 1):
        if heading := re.match(r"\s*\[\[?\s*([\w.\-]+)\s*\]", line):
            prefix = f"{heading[1]}."
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines.setdefault(f"{prefix}{key[1]}", number)
    return lines
