"""Read a preset from its YAML file: lay it over what it extends, write out what it abbreviates, and validate it.

A preset may extend shipped presets and suites, or other files. The blocks of an experiment, and the tasks of the
evaluation, may be a mapping by name, so that a preset can change those that it inherits; blocks share what stands under
`common`. Each mistake is one sentence, which names the field, its value and what is allowed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lorabench.config.experiments import AUTO, Experiments
from lorabench.config.inputs import model_catalogue
from lorabench.config.margins import Margins
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.utils.files import WORKFLOW
from lorabench.utils.studies import studies
from lorabench.utils.yaml_files import read_yaml

PRESETS = WORKFLOW / "presets"
SCHEMA = PRESETS / "schema.json"
COMMON = "common"
"""Key, besides the named blocks of an experiment, for the fields that all of them share."""
TAKEN = ("doctor", "evidence", "models", "partial", "published", "reference", "tiny_bases")
"""Folders in results/ or paper_figures/ that are no preset's."""
# Numbers as people write them; those with more digits are of no use.
_NUMBER = r"[-+]?(\d{1,20}\.?\d{0,20}|\.\d{1,20})([eE][-+]?\d{1,2})?"
_NAME = r"[^\W_][\w +.-]{0,99}(?<![ .])"


def split_name(preset: str) -> tuple[str, int | None]:
    """Return the name or path of a preset, and the first seed that may follow it: 100 in `laptop@100`, else None."""
    named = re.fullmatch(r"(.+)@([0-9]{1,18})", preset)
    return (named[1], int(named[2])) if named else (preset, None)


def preset_path(preset: str) -> Path:
    """Return the file of a preset, given by a shipped name (`laptop`) or the path of a YAML file."""
    preset, _ = split_name(preset)
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else _shipped(preset)
    if not os.path.isfile(path):
        raise UserError(
            f"preset {preset!r}: no file {path}; allowed: {', '.join(shipped('*'))}, or the path of a .yaml file"
        )
    check_name(path)
    return path


def check_name(path: Path) -> None:
    """Raise UserError unless a preset's file may have its name, as its folders in results/ and paper_figures/ do."""
    name = path.stem
    if name.casefold() in TAKEN:
        raise UserError(f"preset {name!r}: this is the name of something else in results/ or paper_figures/")
    if not re.fullmatch(_NAME, name):
        raise UserError(
            f"preset {name!r}: a preset's name begins with a letter or digit; allowed: at most 100 letters, digits, "
            "spaces, and . _ - +"
        )


def _folders() -> Iterator[Path]:
    """Yield the folder of the suite's presets, and then those of studies, which are looked for only if asked for."""
    yield PRESETS
    yield from (study.folder / "presets" for study in studies())


def _shipped(name: str) -> Path:
    """Return the file of a shipped preset or suite; that of the suite's presets, where it is not, if there is none."""
    paths = (folder / f"{name}.yaml" for folder in _folders())
    return next((path for path in paths if os.path.isfile(path)), PRESETS / f"{name}.yaml")


def is_shipped(preset: str) -> bool:
    """Return whether a name, which may have a first seed, is that of a shipped preset."""
    return _shipped(split_name(preset)[0]).is_file()


def shipped(*patterns: str) -> list[str]:
    """Return the names of the shipped presets, those of studies included, by glob pattern, sorted for each."""
    names: list[str] = []
    for pattern in patterns:
        paths = [path.relative_to(folder) for folder in _folders() for path in folder.glob(f"{pattern}.yaml")]
        names += sorted(path.with_suffix("").as_posix() for path in paths)
    return names


def load_preset(preset: str) -> Preset:
    """Read and validate a preset by shipped name or path; `laptop@100` is `laptop` with the first seed 100.

    UserError has one line for each field that is wrong.
    """
    path, (_, first_seed) = preset_path(preset), split_name(preset)
    seeded = {} if first_seed is None else {"first_seed": first_seed}
    return parse_preset(_with_parents(path, ()) | seeded, path)


def parse_preset(raw: dict[str, Any], path: Path) -> Preset:
    """Return the preset of plain data that no longer extends anything; the file's path is for error messages.

    UserError has one line for each field that is wrong.
    """
    whole, names = _written_out(raw, path)
    try:
        return Preset.model_validate(whole)
    except ValidationError as error:
        text = "\n".join(f"{path}: {explain(problem)}" for problem in error.errors())
        # Blocks and tasks that have names are called by them, not by their numbers.
        for place, named in names.items():
            text = re.sub(rf"\b{place}\.(\d+)\b", lambda match: f"{place}.{named[int(match[1])]}", text)  # noqa: B023
        raise UserError(text) from error


def read_margins(path: Path) -> Margins:
    """Read the margins for tables without a preset: a YAML file with the fields of the section `margins`."""
    if not path.is_file():
        raise UserError(f"margins {str(path)!r}: there is no such file")
    raw = _mapping(path, f"margins are a mapping of {', '.join(Margins.model_fields)}")
    return parse_margins(raw["margins"] if raw.keys() == {"margins"} else raw, f"{path}: ")


def parse_margins(raw: Mapping[str, Any], place: str = "") -> Margins:
    """Return the margins of plain data; UserError has one line, which begins with `place`, for each wrong field."""
    try:
        return Margins.model_validate(raw)
    except ValidationError as error:
        problems = [{**problem, "loc": ("margins", *problem["loc"])} for problem in error.errors()]
        raise UserError("\n".join(f"{place}{explain(problem)}" for problem in problems)) from error


def _mapping(path: Path, needed: str) -> dict[str, Any]:
    """Return the content of a YAML file, which must be a mapping; `needed` says so in the error message."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {needed}, not {raw!r}")
    return raw


def _with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """Return the content of a preset's file, laid over the content of the presets that it extends."""
    if path.resolve() in [child.resolve() for child in children]:
        chain = " extends ".join(str(file) for file in (*children, path))
        raise UserError(f"{path}: a preset must not extend itself, but {chain}")
    raw = _mapping(path, f"a preset is a mapping of {', '.join(Preset.model_fields)}")
    extends = raw.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: extends = {extends!r}: the name of a preset, or a list of names, is needed")
    whole: dict[str, Any] = {}
    for parent in parents:
        # A path is relative to the folder of the preset that names it.
        file = path.parent / parent if parent.endswith((".yaml", ".yml")) else _shipped(parent)
        if not file.is_file():
            allowed = ", ".join(shipped("*", "suites/*"))
            raise UserError(f"{path}: extends = {parent!r}: no file {file}; allowed: {allowed}, or a path to .yaml")
        whole = _laid_over(whole, _with_parents(file, (*children, path)))
    return _laid_over(whole, raw)


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


def _written_out(raw: dict[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the data with lists in place of blocks and evaluation tasks by name, and with the models of the catalogue
    that experiments name and the preset does not define itself; and the names in each such list."""
    names: dict[str, list[str]] = {}
    # What is no mapping where one is needed stays as it is, for pydantic to refuse.
    sections = {key: value for key, value in raw.items() if isinstance(value, dict)}
    experiments, evaluation = dict(sections.get("experiments", {})), sections.get("evaluation", {})
    wanted: list[str] = []
    for experiment, blocks in experiments.items():
        if isinstance(blocks, dict) and experiment in Experiments.model_fields and experiment != "compute":
            for key, block in blocks.items():
                if not isinstance(block, dict):
                    raise UserError(
                        f"{path}: experiments.{experiment}.{key} = {block!r}: a block is a mapping; "
                        f"allowed for {experiment}: a list of blocks, or a mapping of blocks by name"
                    )
            names[f"experiments.{experiment}"] = named = [key for key in blocks if key != COMMON]
            blocks = experiments[experiment] = [_laid_over(blocks.get(COMMON, {}), blocks[key]) for key in named]
        for block in blocks if isinstance(blocks, list) else [blocks]:
            models = block.get("models") if isinstance(block, dict) else None
            wanted += [name for name in models if isinstance(name, str)] if isinstance(models, list) else []
    whole = raw | {"experiments": experiments} if names else dict(raw)
    tasks = evaluation.get("tasks")
    if isinstance(tasks, dict) and tasks and all(isinstance(task, dict) for task in tasks.values()):
        names["evaluation.tasks"] = list(tasks)
        whole["evaluation"] = evaluation | {"tasks": [{"name": name} | task for name, task in tasks.items()]}
    own, catalogue = raw.get("models", {}), model_catalogue()
    if isinstance(own, dict):
        whole["models"] = own | {name: catalogue[name] for name in wanted if name in catalogue.keys() - own}
    return whole, names


def explain(problem: Any) -> str:
    """Return a readable sentence for one of pydantic's errors."""
    value, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    current: Any = Preset
    parts: list[str] = []
    for position, part in enumerate(problem["loc"]):
        # pydantic adds the kind of a model or dataset after its name, and that of a grid after the method.
        if position == 2 and (kinds := _kinds(parts[0])) and part != "[key]":
            current = kinds[part]
        elif part != "[key]" and not (part in ("auto", "grid") and parts[-1] in ("fullft", "lora")):
            parts.append(str(part))
            inner = _models_in(current.model_fields[part].annotation) if part in current.model_fields else []
            # The last part names the field that is wrong, of the model that has it.
            if len(inner) == 1 and position < len(problem["loc"]) - 1:
                [current] = inner
    where = ".".join(parts)
    match kind:
        case "extra_forbidden":
            allowed = ", ".join(sorted({*current.model_fields, *(["extends"] if current is Preset else [])}))
            return f"{'.'.join(parts[:-1]) or 'preset'}: unknown key {parts[-1]!r}; allowed: {allowed}"
        case "missing":
            return f"{where}: missing"
        case "value_error":
            return f"{where + ': ' if where else ''}{context['error']}"
        case "float_type" | "int_type" if isinstance(value, str) and re.fullmatch(_NUMBER, value):
            mantissa, mark, exponent = repr(float(value) if kind == "float_type" else int(float(value))).partition("e")
            # To YAML 1.1 an exponent needs a decimal point before it.
            number = f"{mantissa}{'.0' if mark and '.' not in mantissa else ''}{mark}{exponent}"
            return f"{where} = {value!r}: this is text to YAML, not a number; write {number}"
        case "union_tag_not_found":
            return f"{where}: missing key 'kind'; allowed: {', '.join(map(repr, _kinds(parts[0])))}"
        case _:
            return f"{where} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _kinds(section: str) -> dict[str, type[BaseModel]]:
    """Return the classes of models, datasets or problem sets by `kind`; empty for other sections."""
    if section not in ("models", "datasets", "problems"):
        return {}
    models = _models_in(Preset.model_fields[section].annotation)
    return {kind: model for model in models for kind in get_args(model.model_fields["kind"].annotation)}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the model classes in an annotation such as `X | None` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
