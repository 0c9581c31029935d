"""JSON that others have written, at the border: typed data, or one sentence that names the key, its value and the rule.

Pydantic reads it, which limits the depth of JSON and the digits of numbers; a key that is not read here is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_advice.errors import UserError


class Foreign(BaseModel):
    """What is read of a JSON object."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


T = TypeVar("T", bound=Foreign)


def typed(kind: type[T], content: str | bytes | Mapping[str, Any], where: str) -> T:
    """Return JSON, or an object that was read from it, as typed data, or raise a UserError that begins with `where`."""
    try:
        if isinstance(content, Mapping):
            return kind.model_validate(content)
        return kind.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "json_invalid":
            raise UserError(f"{where} is not valid JSON: {problem['ctx']['error']}") from None
        if not problem["loc"]:
            raise UserError(f"{where} is not a mapping") from None
        given = "" if problem["type"] == "missing" else f" = {shortened(problem['input'])}"
        raise UserError(f"{where}: {problem['loc'][0]}{given}: {problem['msg']}") from None
