"""Where the shipped presets lie, and the catalogue of models that every preset may name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lorabench.config.fields import PresetError
from lorabench.utils.files import WORKFLOW

PRESETS = WORKFLOW / "presets"
SCHEMA = PRESETS / "schema.json"
MODELS = WORKFLOW / "models.yaml"
"""The catalogue of models that every preset may name."""


def preset_path(preset: str) -> Path:
    """Return the file of a preset, given by a shipped name (`laptop`) or the path of a YAML file.

    Raises:
        PresetError: there is no such preset.
    """
    path = Path(preset) if is_file_name(preset) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        raise PresetError(
            f"preset {preset!r}: no file {path}; allowed: {shipped_names('*')}, or the path of a .yaml file"
        )
    return path


def is_file_name(preset: str) -> bool:
    """Return whether a preset is named by the path of a YAML file rather than by a shipped name."""
    return preset.endswith((".yaml", ".yml"))


def shipped_names(*patterns: str) -> str:
    """Return the names of the shipped presets that match glob patterns, separated by commas."""
    paths = (path for pattern in patterns for path in sorted(PRESETS.glob(f"{pattern}.yaml")))
    return ", ".join(path.relative_to(PRESETS).with_suffix("").as_posix() for path in paths)


@cache
def model_catalogue() -> dict[str, Any]:
    """Return the specifications, as plain data, of the models that every preset may name."""
    catalogue: dict[str, Any] = yaml.safe_load(MODELS.read_text())
    return catalogue
