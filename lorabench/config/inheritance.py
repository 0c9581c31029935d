"""What a preset inherits: presets and suites that it extends, fields common to named blocks, and catalogued models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lorabench.config.experiments import AUTO, Experiments
from lorabench.config.fields import PresetError
from lorabench.config.files import PRESETS, is_file_name, model_catalogue, shipped_names
from lorabench.config.preset import Preset

COMMON = "common"
"""Key, beside the named blocks of an experiment, for the fields that all of them share."""


def read_with_parents(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a preset's file, laid over the content of the presets that it extends.

    Raises:
        PresetError: a file does not exist, is not a YAML mapping, or extends itself.
    """
    if path.resolve() in [child.resolve() for child in children]:
        chain = " extends ".join(str(file) for file in (*children, path))
        raise PresetError(f"{path}: a preset must not extend itself, but {chain}")
    raw = dict(_mapping(path))
    extends = raw.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise PresetError(f"{path}: extends = {extends!r}: the name of a preset, or a list of names, is needed")
    whole: dict[str, Any] = {}
    for parent in parents:
        whole = _laid_over(whole, read_with_parents(_parent_path(parent, path), (*children, path)))
    return _laid_over(whole, raw)


def _parent_path(parent: str, child: Path) -> Path:
    """Return the file that a preset extends: a shipped one by name, or a path relative to the preset's folder."""
    path = child.parent / parent if is_file_name(parent) else PRESETS / f"{parent}.yaml"
    if not path.is_file():
        allowed = shipped_names("*", "suites/*")
        raise PresetError(f"{child}: extends = {parent!r}: no file {path}; allowed: {allowed}, or a path to .yaml")
    return path


def _mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise PresetError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise PresetError(f"{path}: a preset is a mapping of {', '.join(Preset.model_fields)}, not {raw!r}")
    return raw


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return both mappings, merged at every level.

    Where one of two values is no mapping, or they have different kinds (of a model, say), the upper value replaces the
    lower one; null removes it. The LRs `auto` count as the mapping that they stand for, so that one method's can be
    changed.
    """
    merged = dict(below)
    for key, value in above.items():
        other = below.get(key)
        if key == "lrs" and other == AUTO and isinstance(value, dict):
            other = {"fullft": AUTO, "lora": AUTO}
        if value is None and key in below:
            del merged[key]
        elif isinstance(value, dict) and isinstance(other, dict) and value.get("kind") in (None, other.get("kind")):
            merged[key] = _laid_over(other, value)
        else:
            merged[key] = value
    return merged


def _named_blocks(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the experiments whose blocks are a mapping by name, with `COMMON` among the names."""
    experiments = raw.get("experiments")
    if not isinstance(experiments, dict):
        return {}
    named = {name: blocks for name, blocks in experiments.items() if isinstance(blocks, dict)}
    return {name: blocks for name, blocks in named.items() if name in Experiments.model_fields and name != "compute"}


def _named_tasks(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the tasks of the evaluation if they are a mapping by name, else an empty mapping."""
    evaluation = raw.get("evaluation")
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    return tasks if isinstance(tasks, dict) and all(isinstance(task, dict) for task in tasks.values()) else {}


def with_lists(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the data with lists in place of named blocks and of evaluation tasks by name.

    Raises:
        PresetError: a named block is not a mapping.
    """
    lists: dict[str, list[Any]] = {}
    for name, blocks in _named_blocks(raw).items():
        for key, block in blocks.items():
            if not isinstance(block, dict):
                raise PresetError(
                    f"{path}: experiments.{name}.{key} = {block!r}: a block is a mapping; "
                    f"allowed for {name}: a list of blocks, or a mapping of blocks by name"
                )
        common = blocks.get(COMMON, {})
        lists[name] = [_laid_over(common, block) for key, block in blocks.items() if key != COMMON]
    whole = _laid_over(raw, {"experiments": lists}) if lists else raw
    if tasks := [{"name": name} | task for name, task in _named_tasks(raw).items()]:
        whole = _laid_over(whole, {"evaluation": {"tasks": tasks}})
    return whole


def with_models(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the data with the models of the catalogue that its experiments name and that it does not define itself."""
    own = raw.get("models", {})
    if not isinstance(own, dict):
        return raw
    missing = [name for name in dict.fromkeys(_models_named(raw)) if name not in own]
    return raw | {"models": own | {name: model_catalogue()[name] for name in missing if name in model_catalogue()}}


def _models_named(raw: dict[str, Any]) -> Iterator[str]:
    experiments = raw.get("experiments")
    for blocks in experiments.values() if isinstance(experiments, dict) else ():
        for block in blocks if isinstance(blocks, list) else [blocks]:
            models = block.get("models") if isinstance(block, dict) else None
            yield from (name for name in models if isinstance(name, str)) if isinstance(models, list) else ()


def with_names(sentence: str, raw: dict[str, Any]) -> str:
    """Return a sentence about a preset with the names of its named blocks and tasks in place of their numbers."""
    named = {
        f"experiments.{experiment}": [key for key in blocks if key != COMMON]
        for experiment, blocks in _named_blocks(raw).items()
    }
    named["evaluation.tasks"] = list(_named_tasks(raw))

    def called(match: re.Match[str]) -> str:
        section, number = match[1], int(match[2])
        names = named.get(section, [])
        return f"{section}.{names[number]}" if number < len(names) else match[0]

    return re.sub(r"\b(experiments\.\w+|evaluation\.tasks)\.(\d+)\b", called, sentence)
