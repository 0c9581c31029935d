"""Shipped models, chat templates, and hashes of all that determines a model's weights, tokenizer and template."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel, TinyModel
from lorabench.utils.files import digest

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the tiny bases, which `workflow/scripts/tiny_bases.py` has pretrained."""

# A line break precedes each turn's text, so that a tokenizer can't merge the turn's first word with the text before it.
PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].capitalize() + ':\n' }}{% endif %}"
    "{{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
"""The template `plain`: a heading above each turn, and the model's end token after each turn of the assistant."""


def template_text(setting: str) -> str:
    """Return the template that a model's `chat_template` names: `plain`, or the path of a Jinja file."""
    return PLAIN if setting == "plain" else Path(setting).read_text(encoding="utf-8")


def shipped_folder(name: str) -> Path:
    """Return the folder of a shipped tiny base."""
    return SHIPPED / name


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
