"""YAML read safely, as PyYAML understands it, with the line of each key."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lora_advice.errors import UserError

LONGEST = 100_000
"""Characters that references may make of a value."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast, and not everywhere


class _OmegaConfLoader(_Loader):  # type: ignore[misc]
    """OmegaConf reads `2e-4` as a number, which PyYAML reads as text, since YAML 1.1 asks for a dot in a float."""


_OmegaConfLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load(text: str, *, as_omegaconf: bool = False) -> tuple[Any, dict[str, int]]:
    """Return the data of a YAML file.

    Args:
        as_omegaconf: read numbers as OmegaConf does.

    Returns:
        The data, and the lines (from 1) by dotted key, such as `optimizer.lr` or `datasets.0.path`.

    Raises:
        UserError: it is not YAML, has several documents, or uses tags or templates that need a program.
    """
    loader = (_OmegaConfLoader if as_omegaconf else _Loader)(text)
    lines, seen = dict[str, int](), set[int]()

    def note_keys(node: yaml.Node, prefix: str) -> None:
        # What an alias repeats is listed where it stands first, so that aliases of aliases cannot make the list long.
        if id(node) in seen:
            return
        seen.add(id(node))
        children = list[tuple[str, yaml.Node, yaml.Node]]()
        if isinstance(node, yaml.MappingNode):
            children = [(str(key.value), key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        elif isinstance(node, yaml.SequenceNode):
            children = [(str(number), item, item) for number, item in enumerate(node.value)]
        for name, marked, child in children:
            # The last of several is the one that counts.
            lines[prefix + name] = marked.start_mark.line + 1
            note_keys(child, f"{prefix}{name}.")

    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        note_keys(node, "")
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        if re.search(r"^[ \t]*\{%|\{\{", text, re.MULTILINE):
            raise UserError("it is a Jinja template, with {% ... %} or {{ ... }}: render it first") from error
        place = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"it is not valid YAML: {error.problem or error.context}{place}") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML stumbles over values that do not suit their tags.
        raise UserError(f"it is not valid YAML: {str(error).splitlines()[0]}") from error
    finally:
        loader.dispose()
