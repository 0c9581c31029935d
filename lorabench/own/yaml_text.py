"""Pieces of a preset as YAML text."""

from __future__ import annotations

import re

import yaml

from lorabench.config import yaml_number


def one_line(text: str) -> str:
    """What is put into a comment must not leave its line."""
    return " ".join(text.split())


def block(fields: dict[str, object]) -> str:
    """A mapping, indented as what has a kind (a model, a dataset) or, without one, as what a preset has one of."""
    indent = "  " if "kind" not in fields else "    "
    return "\n".join(f"{indent}{name}: {_scalar(value)}" for name, value in fields.items())


def _scalar(value: object) -> str:
    if isinstance(value, float):
        return yaml_number(value)
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    """A text on one line, whatever is in it; words that are nothing else to YAML stay bare."""
    bare = re.fullmatch(r"[A-Za-z][\w./-]*", text) and yaml.safe_load(text) == text
    return text if bare else yaml.safe_dump(text, default_style='"', width=10**9).strip()


def numbers(lrs: list[float]) -> str:
    """A list as the shipped presets write it, 2.2e-4, which YAML reads as a number."""
    return f"[{', '.join(f'{lr:.1e}'.replace('e-0', 'e-') for lr in lrs)}]"


def slug(name: str) -> str:
    """A name for a preset: `meta-llama/Llama-3.2-1B` becomes `llama-3-2-1b`."""
    stem = re.sub(r"\.(gguf|jsonl|json|csv|parquet)$", "", name.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "own"
