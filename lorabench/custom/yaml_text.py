"""A preset as commented YAML, written by ruamel.yaml and readable by PyYAML, which loads presets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from io import StringIO

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from lorabench.config.loading import yaml_number


@dataclass(frozen=True)
class Noted:
    """A value in a mapping, with a comment for the line above its key."""

    comment: str
    value: object


@dataclass(frozen=True)
class Inline:
    """A mapping to be written on one line, in braces."""

    fields: dict[str, object]


def yaml_text(heading: str, content: dict[str, object]) -> str:
    """Return a mapping as YAML text, in its own order.

    Args:
        heading: lines of the comment at the top.
        content: nested mappings (dict, Inline or Noted), lists, texts and numbers; a list of numbers or texts is
            written on one line.
    """
    document = _mapping(content, 0)
    document.yaml_set_start_comment(heading)
    writer = YAML()
    writer.Representer = _Representer
    writer.indent(mapping=2, sequence=4, offset=2)
    # No line is folded.
    writer.width = 10**9
    text = StringIO()
    writer.dump(document, text)
    return text.getvalue()


def one_line(text: str) -> str:
    """Return a text without line breaks, since a comment must not leave its line."""
    return " ".join(text.split())


def slug(name: str) -> str:
    """Return a name as presets allow it: `meta-llama/Llama-3.2-1B` becomes `llama-3-2-1b`."""
    stem = re.sub(r"\.(gguf|jsonl|json|csv|parquet)$", "", name.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "own"


def _node(value: object, column: int) -> object:
    if isinstance(value, dict):
        return _mapping(value, column)
    if isinstance(value, Inline):
        mapping = _mapping(value.fields, column)
        mapping.fa.set_flow_style()
        return mapping
    if isinstance(value, list):
        items = CommentedSeq(_node(item, column + 2) for item in value)
        if not any(isinstance(item, dict) for item in value):
            items.fa.set_flow_style()
        return items
    return value


def _mapping(fields: dict[str, object], column: int) -> CommentedMap:
    mapping = CommentedMap()
    for name, field in fields.items():
        value = field.value if isinstance(field, Noted) else field
        mapping[name] = _node(value, column + 2)
        if isinstance(field, Noted):
            mapping.yaml_set_comment_before_after_key(name, before=field.comment, indent=column)
    return mapping


class _Representer(RoundTripRepresenter):
    """Writes texts and numbers so that YAML 1.1 reads them back: ruamel.yaml writes YAML 1.2."""

    def represent_text(self, text: str) -> ScalarNode:
        """Write a plain word without quotes, and any other text, such as `yes` or `2024`, in quotes."""
        bare = re.fullmatch(r"[A-Za-z][\w./-]*", text) and yaml.safe_load(text) == text
        return self._scalar("str", text, None if bare else '"')

    def represent_number(self, number: float) -> ScalarNode:
        """Write a small number, such as a learning rate, as the shipped presets do: 2.2e-4."""
        short = f"{number:.1e}".replace("e-0", "e-")
        return self._scalar("float", short if 0 < number < 0.1 and float(short) == number else yaml_number(number))

    def _scalar(self, kind: str, text: str, style: str | None = None) -> ScalarNode:
        node: ScalarNode = self.represent_scalar(f"tag:yaml.org,2002:{kind}", text, style=style)
        return node


_Representer.add_representer(str, _Representer.represent_text)
_Representer.add_representer(float, _Representer.represent_number)
