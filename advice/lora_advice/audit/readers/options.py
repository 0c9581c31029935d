"""Options of a run by name, from a command line, a file with nested options or a call in Python, and records of them.

Values that are not understood count as not said. Names are written with spaces between them where a format has several
for one thing: the first that has a value counts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lora_advice.audit.config import TrainingConfig, say
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level

LONGEST = 100_000  # characters that references may make of a value

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast, and not everywhere


class _OmegaConfLoader(_Loader):  # type: ignore[misc]
    """OmegaConf reads `2e-4` as a number, which PyYAML reads as text, since YAML 1.1 asks for a dot in a float."""


_OmegaConfLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

_MOST_OPTIONS = 200_000


def load(text: str, *, as_omegaconf: bool = False) -> tuple[Any, dict[str, int]]:
    """Return the data of a YAML file, and lines (from 1) by dotted key, such as `optimizer.lr` or `datasets.0.path`.

    A file that is not YAML, has several documents, or needs a program for its tags or templates raises UserError.
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


@cache
def frameworks() -> dict[str, dict[str, Any]]:
    """Return the content of `frameworks.yaml`, which says what is in it."""
    frameworks: dict[str, dict[str, Any]] = load(Path(__file__).with_name("frameworks.yaml").read_text("utf-8"))[0]
    return frameworks


def number(value: Any) -> float | None:
    """Return a number, also of text such as `2e-4`; null if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


def count(value: Any) -> int | None:
    """Return a whole number above 0, null if it is none."""
    read = number(value)
    return int(read) if read is not None and read == int(read) and read > 0 else None


def text(value: Any) -> str | None:
    """Return text in one line; null of what is empty or a place to fill in, such as `${MODEL}` or `<model>`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    said = " ".join(str(value).split())
    empty = not said.isprintable() or said.lower() in ("", "none", "null", "...") or said.startswith("<")
    return None if empty or any(mark in said for mark in ("${", "{{", "$(")) else said


def flag(value: Any) -> bool | None:
    """Return whether an option is on, null if it is not said; words count as YAML and command lines write them."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "yes", "on", "1")
    return None if value is None else bool(value) and not isinstance(value, Mapping | list)


def names(value: Any) -> tuple[str, ...] | None:
    """Return the names of a list; a text is one name."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list | tuple | set) else []
    return tuple(name for item in items if (name := text(item)) is not None) or None


_KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("model", "schedule", "optimizer"), text),
    **dict.fromkeys(("lr", "steps", "epochs", "alpha", "dropout", "lr_ratio"), number),
    **dict.fromkeys(("micro_batch", "accumulation", "devices", "group_size", "global_batch", "rank"), count),
    **dict.fromkeys(("rslora", "dora"), flag),
    **dict.fromkeys(("targets", "target_parameters", "saved_modules"), names),
    # With `gaussian` A starts larger, which by the theory `movement` matters in short runs alone.
    "variant": lambda value: None if value == "gaussian" else text(value),
}
"""How the value of a field of a record is read."""
_SPELT = frozenset(
    {"lr", "micro_batch", "accumulation", "epochs", "rank", "alpha", "dropout", "rslora", "dora", "targets"}
)
"""The fields of which a misspelt option is found."""
_ALIKE = 0.8  # the least ratio of difflib of a misspelt name
_LORA_FIELDS = {
    *("rank", "alpha", "dropout", "rslora", "dora", "lr_ratio", "variant"),
    *("targets", "target_parameters", "saved_modules"),
}


@dataclasses.dataclass
class Options:
    """Values by name. A value that is said but not known, such as that of a variable of the shell, is null."""

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: dict[str, int] = dataclasses.field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, names: str) -> Any:
        """Return the value of the first of some names that has one, or null."""
        return next((self.values[name] for name in names.split() if self.values.get(name) is not None), None)

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Set the values of names that are not there, without a line, which marks a default."""
        self.values = {**defaults, **self.values}

    def has(self, name: str) -> bool:
        """Return whether an option is set to something, or has options below it."""
        return bool(self.values.get(name)) or any(key.startswith(f"{name}.") for key in self.values)

    def line(self, names: str) -> int | None:
        """Return the line of the first of some names that has a value."""
        name = next((name for name in names.split() if self.values.get(name) is not None), "")
        return self.lines.get(name)

    def without_effect(self, framework: str, reason: str, level: Level) -> list[Finding]:
        """Return the finding that the framework's options of LoRA that are set have no effect, since `reason`."""
        stated = [name for name in frameworks()[framework]["lora"] if self.values.get(name)]
        if not stated:
            return []
        value = text(self.values[stated[0]])
        first = stated[0] if value is None else f"{stated[0]}: {value}"
        others = f" (as have {', '.join(stated[1:])})" if stated[1:] else ""
        values = {"first": first, "others": others, "reason": reason}
        return [say("no-options", self.lines.get(stated[0]), level=level, **values)]


def misspelt(framework: str, options: Options) -> list[Finding]:
    """Return options that the framework does not have, and that are like one that it has and that is not set.

    Like it are names that differ in a few letters, and those that other frameworks have for the same thing.
    """
    table = frameworks()[framework]
    own = {field: names.split()[0] for field, names in table["names"].items() if field in _SPELT}
    known = {name for names in table["names"].values() for name in names.split()} | {*table["near"]}
    others = {
        name: own[field]
        for other in frameworks().values()
        for field, names in other.get("names", {}).items()
        for name in names.split()
        if field in own and "." not in name
    }
    findings = []
    for key in options.values:
        if "." in key or key in known:
            continue
        close = difflib.get_close_matches(key, own.values(), 1, _ALIKE)
        meant = others.get(key, next(iter(close), None))
        if meant is not None and options[meant] is None:
            values = {"framework": table["called"], "key": key, "meant": meant}
            values |= {"sure": table["sure"]} if "sure" in table else {}
            findings.append(say("refused" if "sure" in table else "passed-over", options.lines.get(key), **values))
    return findings


def read_yaml(content: str, *, as_omegaconf: bool = False) -> Options:
    """Return the options of a YAML file by dotted name, in which a list is a value.

    As OmegaConf does, `2e-4` is a number, and references such as `${base.dir}` become the values that they name.
    """
    data, lines = load(content, as_omegaconf=as_omegaconf)
    if not isinstance(data, dict):
        raise UserError("it has no options: it is not a mapping")
    flat: dict[str, Any] = {}

    def flatten(data: Mapping[Any, Any], prefix: str) -> None:
        for key, value in data.items():
            if isinstance(value, Mapping):
                flatten(value, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = value
            if len(flat) > _MOST_OPTIONS:
                raise UserError(f"it has more than {_MOST_OPTIONS:,} options")

    @cache
    def resolve(value: str, depth: int) -> Any:
        if depth > 8:
            return value
        if whole := re.fullmatch(r"\$\{([\w.]+)\}", value):
            said = flat.get(whole[1], value)
            said = resolve(said, depth + 1) if isinstance(said, str) else said
        else:
            said = re.sub(r"\$\{[\w.]+\}", lambda reference: str(resolve(reference[0], depth + 1)), value)
        # References to references can be of exponential size.
        return said if len(str(said)) <= LONGEST else value

    flatten(data, "")
    if as_omegaconf:
        flat = {name: resolve(value, 0) if isinstance(value, str) else value for name, value in flat.items()}
    return Options(flat, lines)


def record(
    path: Path,
    framework: str,
    options: Options,
    keys: Mapping[str, str] | None = None,
    findings: Sequence[Finding] = (),
    *,
    name: str = "",
    lora: bool = True,
    **said: Any,
) -> TrainingConfig:
    """Return the record of a run, in which numbers without meaning, such as rank 0, are findings and no values.

    `keys` are the names for the fields of a record, if not those of the framework; `lora` says whether the fields of
    LoRA count, if the method is not full fine-tuning; `said` are fields that are not what their options say.
    """
    keys = frameworks()[framework]["names"] if keys is None else keys
    fields = {field: kind(options[keys[field]]) for field, kind in _KINDS.items() if field in keys} | said
    left_out = _LORA_FIELDS if not lora or fields.get("method") == "fullft" else ()
    fields = {field: value for field, value in fields.items() if value is not None and field not in left_out}
    if "accumulation" not in fields and any(name in options for name in keys.get("accumulation", "").split()):
        fields.pop("micro_batch", None)  # the batch is not known if a factor of it is not
    lines = {field: line for field in fields if (line := options.line(keys.get(field, ""))) is not None}
    unused = {"epochs"} if fields.get("steps", 0) > 0 else set()
    if fields.get("method") != "lora":
        unused |= _LORA_FIELDS
    wrong = list[Finding]()
    for field, (noun, low, high, kind) in frameworks()["all"]["numbers"].items():
        value = options[keys.get(field, "")]
        if field in unused or isinstance(value, bool):
            continue
        try:
            allowed = low <= float(value) <= high and (kind == "numbers" or float(value) % 1 == 0)
        except (TypeError, ValueError):  # it is no number at all, which is not said or another finding
            continue
        except OverflowError:
            allowed = False
        if not allowed:
            values = {"noun": noun, "value": f"{value!s:.40}", "kind": kind, "low": low, "high": high}
            wrong.append(say("number", options.line(keys[field]), **values))
            fields.pop(field, None)
    every = (*findings, *wrong)
    return TrainingConfig(path.as_posix(), framework, name, lines=lines, findings=every, **fields)
