"""JSON that others have written, at the border: typed data, or one sentence that names the key, its value and the rule.

Pydantic reads it, which limits the depth of JSON and the digits of numbers; a key that is not read here is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_advice.errors import UserError


class Foreign(BaseModel):
    """What is read of a JSON object; the description of a field says what is allowed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


T = TypeVar("T", bound=Foreign)


def whole(least: int, most: int) -> Any:
    """Return a field with a whole number, null by default."""
    return Field(None, ge=least, le=most, description=f"a whole number from {least:,} to {most:,}")


def typed(kind: type[T], content: str | bytes | Mapping[str, Any], where: str) -> T:
    """Return JSON, or an object that was read from it, as typed data.

    Raises:
        UserError: it is not valid; the sentence begins with `where`.
    """
    try:
        if isinstance(content, Mapping):
            return kind.model_validate(content)
        return kind.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place, message = problem["loc"], problem.get("ctx", {}).get("error", problem["msg"])
        if problem["type"] == "json_invalid":
            raise UserError(f"{where} is not valid JSON: {message}") from None
        if not place:
            # Its values contradict each other, or it is no object.
            contradiction = problem["type"] == "value_error"
            raise UserError(f"{where}: {message}" if contradiction else f"{where} is not a mapping") from None
        key, allowed = str(place[0]), kind.model_fields[str(place[0])].description
        if problem["type"] == "missing" and len(place) == 1:
            raise UserError(f"{where} has no {key!r}; needed: {allowed}") from None
        content = content if isinstance(content, Mapping) else json.loads(content)
        raise UserError(f"{where}: {key} = {shortened(content[key])}: allowed: {allowed}") from None
