"""YAML of users, read safely: what would take long to read, or has a second meaning, is refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorabench.errors import UserError
from lorabench.utils.formats import printable

MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 1_000_000, 20_000, 50, 20
"""The limits of a file, of its keys and values with those that aliases repeat, of its levels, and of a whole number."""

# The loader in C is ten times as fast, and is not everywhere.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]
    """The safe loader without whole numbers that take long to read or to print."""


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int:
    if len(node.value) > MAX_DIGITS:
        problem = f"the number {node.value[:MAX_DIGITS]}... has more than {MAX_DIGITS} digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return int(loader.construct_yaml_int(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def read_yaml(path: Path) -> Any:
    """Return the data of a YAML file; the errors are those of `parse_yaml`."""
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: a YAML file has at most {MAX_BYTES / 1e6:g} MB here")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: it is not UTF-8") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> Any:
    """Return the data of YAML text; UserError, which names the file of a path, says that it is not YAML.

    It also says that a mapping repeats a key, of which YAML would take the last, or that there are tags, too many nodes
    or levels, or an alias of what contains it.
    """
    try:
        _check(text, path)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        reason = str(error).split("\n")[0]
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            parts = (part for part in (error.context, error.problem) if part)
            reason = f"{', '.join(parts)} (line {error.problem_mark.line + 1})"
        raise UserError(f"{path}: not valid YAML: {printable(reason)}") from error


@dataclass
class _Open:
    """A mapping or a list whose end has not been read: its anchor, the size before it, and what it has so far."""

    anchor: str | None
    before: int
    keys: set[str] | None  # None in a list.
    key_is_next: bool = True


def _check(text: str, path: Path) -> None:
    """Check a file before its data are built, since aliases of aliases can be of exponential size."""
    size, sizes, inside = 0, dict[str | None, int](), list[_Open]()
    events: Any = yaml.parse(text, _Loader)
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            ended = inside.pop()
            sizes[ended.anchor] = size - ended.before
        if not isinstance(event, yaml.NodeEvent):
            continue
        wrong, is_alias = "", isinstance(event, yaml.AliasEvent)
        parent = inside[-1] if inside else None
        if parent and parent.keys is not None:
            if parent.key_is_next and isinstance(event, yaml.ScalarEvent):
                if event.value in parent.keys:
                    wrong = f"the key {event.value[:80]!r} is there twice"
                parent.keys.add(event.value)
            parent.key_is_next = not parent.key_is_next
        if is_alias and any(event.anchor == outer.anchor for outer in inside):
            wrong = f"*{event.anchor} is an alias of what contains it"
        if not is_alias and event.tag is not None:
            wrong = f"the tag {event.tag[:80]!r} can't be used here"
        if isinstance(event, yaml.CollectionStartEvent):
            inside.append(_Open(event.anchor, size, set() if isinstance(event, yaml.MappingStartEvent) else None))
        size += sizes.get(event.anchor, 1) if is_alias else 1
        if size > MAX_NODES:
            wrong = f"there are more than {MAX_NODES:,} keys and values, with those that aliases repeat"
        if len(inside) > MAX_DEPTH:
            wrong = f"there are more than {MAX_DEPTH} levels"
        if wrong:
            raise UserError(f"{path}, line {event.start_mark.line + 1}: {wrong}")
