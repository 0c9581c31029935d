"""The JSON schema of a preset's file, for editors."""

from __future__ import annotations

import json
from typing import Any

from lorabench.config.preset import Preset


def json_schema() -> str:
    """Return the JSON schema of a preset's file, as shipped beside the presets for editors.

    It requires no field, because a file may extend another that has it; `load_preset` says what is missing.
    """
    schema = _without_required(Preset.model_json_schema())
    defs = schema["$defs"]
    for blocks in defs["Experiments"]["properties"].values():
        if blocks["anyOf"][0].get("type") == "array":
            blocks["anyOf"].insert(1, _by_name(blocks["anyOf"][0]["items"]))
    tasks = defs["Evaluation"]["properties"]["tasks"]
    tasks["anyOf"] = [{key: tasks.pop(key) for key in ("items", "minItems", "type")}]
    tasks["anyOf"].append(_by_name(tasks["anyOf"][0]["items"]))
    extends = {
        "anyOf": [{"type": "string"}, {"items": {"type": "string"}, "type": "array"}],
        "description": "Presets or suites, by shipped name or path, whose fields this file changes or adds to.",
    }
    schema["properties"] = {"extends": extends} | schema["properties"]
    return json.dumps(schema, indent=2) + "\n"


def _by_name(items: dict[str, Any]) -> dict[str, Any]:
    return {"additionalProperties": {"anyOf": [items, {"type": "null"}]}, "type": "object"}


def _without_required(schema: Any) -> Any:
    """Return a JSON schema without required fields, which a part of a preset satisfies too, even without a `kind`."""
    if isinstance(schema, list):
        return [_without_required(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # `required` may also be the name of a property, whose value is no list.
    kept = {
        key: _without_required(value)
        for key, value in schema.items()
        if key != "discriminator" and not (key == "required" and isinstance(value, list))
    }
    return {("anyOf" if key == "oneOf" else key): value for key, value in kept.items()}
