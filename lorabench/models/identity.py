"""Hashes of everything that determines a model's weights, tokenizer and chat template."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from lorabench.config.models import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.models.chat_template import template_text
from lorabench.models.tiny import shipped_folder
from lorabench.utils.files import digest


@cache
def model_id(spec: ModelSpec) -> str:
    """Return the hash of everything that determines a model's weights, tokenizer and chat template, without paths."""
    template = None if isinstance(spec, TinyModel) else spec.chat_template
    return weights_id(spec) if template is None else digest([weights_id(spec), template_text(template)], 8)


@cache
def weights_id(spec: ModelSpec) -> str:
    """Return the hash of everything that determines a model's weights and tokenizer."""
    match spec:
        case TinyModel():
            return digest(json.loads((shipped_folder(spec.name) / "recipe.json").read_text())["weights_sha256"], 8)
        case HubModel():
            return digest([spec.id, spec.revision], 8)
        case GgufModel():
            return digest(spec.sha256, 8)
        case PathModel():
            folder = Path(spec.path)
            files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
            return digest([[path.name, path.stat().st_size, _ends_sha256(path)] for path in files], 8)


def _ends_sha256(path: Path, size: int = 1 << 20) -> str:
    """Return the SHA-256 of a file's first and last MiB, which suffice to distinguish trained weights."""
    with path.open("rb") as file:
        ends = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return hashlib.sha256(ends + file.read(size)).hexdigest()
