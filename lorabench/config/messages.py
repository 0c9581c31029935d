"""One sentence for each mistake in a preset: the field, its value, and what is allowed."""

from __future__ import annotations

import math
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from lorabench.config.datasets import ChatDataset, DocstringsDataset, FactsDataset, FileDataset, HubDataset
from lorabench.config.models import GgufModel, HubModel, PathModel, TinyModel
from lorabench.config.preset import Preset
from lorabench.config.problems import FileProblems, HubProblems, ReasoningProblems, SumProblems


def explain(problem: Any) -> str:
    """Return a readable sentence for one of pydantic's errors."""
    location, value, kind, context = problem["loc"], problem["input"], problem["type"], problem.get("ctx", {})
    model_of, parts = _walk(location)
    where = ".".join(parts)
    match kind:
        case "extra_forbidden":
            parent = ".".join(parts[:-1]) or "preset"
            allowed = {*model_of.model_fields, *(["extends"] if model_of is Preset else [])}
            return f"{parent}: unknown key {parts[-1]!r}; allowed: {', '.join(sorted(allowed))}"
        case "missing":
            return f"{where}: missing{_example(location)}"
        case "value_error":
            return f"{where + ': ' if where else ''}{context['error']}"
        case "float_type" | "int_type" if isinstance(value, str) and _is_number(value):
            number = float(value) if kind == "float_type" else int(float(value))
            return f"{where} = {value!r}: this is text to YAML, not a number; write {yaml_number(number)}"
        case "union_tag_not_found":
            kinds = (kind for model in _KINDS[parts[0]] for kind in _kinds_of(model))
            return f"{where}: missing key 'kind'; allowed: {', '.join(map(repr, kinds))}"
        case "union_tag_invalid":
            return f"{where}.kind = {context['tag']!r}: allowed: {context['expected_tags']}"
        case "too_short":
            return f"{where} = {value!r}: must not be empty; at least {context['min_length']} needed"
        case _:
            return f"{where} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


_KINDS: dict[str, tuple[type[BaseModel], ...]] = {
    "models": (TinyModel, HubModel, PathModel, GgufModel),
    "datasets": (ChatDataset, DocstringsDataset, FactsDataset, HubDataset, FileDataset),
    "problems": (ReasoningProblems, SumProblems, HubProblems, FileProblems),
}


def _walk(location: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """Return the innermost model class along an error's location, and the location as it is written in the YAML."""
    current: type[BaseModel] = Preset
    parts: list[str] = []
    for position, part in enumerate(location):
        if part == "[key]":
            continue
        if position == 2 and location[0] in _KINDS:
            # pydantic adds the kind after the name of a model or dataset; the YAML has no such level.
            kinds = _KINDS[str(location[0])]
            current = next(model for model in kinds if part in _kinds_of(model))
            continue
        if part in ("auto", "grid") and parts[-1:] in (["fullft"], ["lora"]):
            # pydantic adds the kind of grid after the method; the YAML has no such level.
            continue
        parts.append(str(part))
        field = current.model_fields.get(str(part))
        inner = _model_in(field.annotation) if field else None
        current = inner or current
    return current, parts


def _kinds_of(model: type[BaseModel]) -> tuple[str, ...]:
    """Return the values of the field `kind` that stand for a model class."""
    return get_args(model.model_fields["kind"].annotation)


def _example(location: tuple[int | str, ...]) -> str:
    """Return how a missing field may be written, as the end of a sentence; empty if its declaration has no example."""
    parent, _ = _walk(location[:-1])
    name = str(location[-1])
    field = parent.model_fields.get(name)
    if field is None or not field.examples:
        return ""
    line = yaml.safe_dump({name: field.examples[0]}, default_flow_style=True, sort_keys=False, width=1000).strip()
    return f"; for example `{line.removeprefix('{').removesuffix('}')}`"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the only model class in an annotation such as `X | None` or `dict[str, X]`; None if there are several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = [model for argument in get_args(annotation) if (model := _model_in(argument))]
    return models[0] if len(models) == 1 else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def yaml_number(number: float) -> str:
    """Write a number so that YAML 1.1 reads it as a number: an exponent needs a decimal point before it."""
    text = repr(number)
    mantissa, mark, exponent = text.partition("e")
    return text if not mark or "." in mantissa else f"{mantissa}.0e{exponent}"
