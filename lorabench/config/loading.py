"""Read a preset from its YAML file and validate it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorabench.config.fields import PresetError
from lorabench.config.files import preset_path
from lorabench.config.inheritance import read_with_parents, with_lists, with_models, with_names
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
