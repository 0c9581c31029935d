"""Read a preset from its YAML file and validate it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorabench.config.fields import PresetError
from lorabench.config.files import preset_path
from lorabench.config.inheritance import read_with_parents, with_lists, with_models, with_names
from lorabench.config.margins import Margins
from lorabench.config.messages import explain
from lorabench.config.preset import Preset


def load_preset(preset: str) -> Preset:
    """Read and validate a preset by shipped name or path.

    Raises:
        PresetError: there is no such preset, it is not YAML, it extends what it can't, or a field is wrong; one line
            per field.
    """
    path = preset_path(preset)
    return parse_preset(read_with_parents(path), path)


def parse_preset(raw: dict[str, Any], path: Path) -> Preset:
    """Return the preset of plain data that no longer extends anything.

    Args:
        raw: the content of the preset's file, laid over that of the presets it extends.
        path: the file, for error messages.

    Raises:
        PresetError: a field is wrong; one line per field.
    """
    try:
        return Preset.model_validate(with_models(with_lists(raw, path)))
    except ValidationError as error:
        sentences = (with_names(explain(problem), raw) for problem in error.errors())
        raise PresetError("\n".join(f"{path}: {sentence}" for sentence in sentences)) from error


def read_margins(path: Path) -> Margins:
    """Read the margins for tables without a preset: a YAML file with the fields of the section `margins`.

    Raises:
        PresetError: the file does not exist or is not YAML, or a field is wrong; one line per field.
    """
    if not path.is_file():
        raise PresetError(f"margins {str(path)!r}: there is no such file")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PresetError(f"{path}: not valid YAML: {error}") from error
    if isinstance(raw, dict) and set(raw) == {"margins"}:
        raw = raw["margins"]
    if not isinstance(raw, dict):
        raise PresetError(f"{path}: margins are a mapping of {', '.join(Margins.model_fields)}, not {raw!r}")
    try:
        return Margins.model_validate(raw)
    except ValidationError as error:
        sentences = (explain({**problem, "loc": ("margins", *problem["loc"])}) for problem in error.errors())
        raise PresetError("\n".join(f"{path}: {sentence}" for sentence in sentences)) from error
