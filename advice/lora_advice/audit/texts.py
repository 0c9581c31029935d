"""The texts of findings, which are in `texts.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lora_advice.finding import Finding


@cache
def _texts() -> dict[str, dict[str, str]]:
    texts: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text("utf-8"))
    return texts


def say(name: str, line: int | None = None, /, **values: Any) -> Finding:
    """Return the finding of a text with values filled in; `level` among them takes the place of its own."""
    text = _texts()[name]
    filled = {field: text[field].format(**values) for field in ("message", "source", "sure")}
    return Finding(text["code"], values.get("level", text["level"]), line=line, **filled)
