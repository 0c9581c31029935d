"""The section `predictions` of a preset: what studies predict, written down before the runs and judged like claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lorabench.utils.studies import studies

Predictions = Mapping[str, Any]
"""By study, what is predicted, as plain data with all fields of the study's model `Predictions`."""


def checked_predictions(stated: Predictions) -> dict[str, Any]:
    """Return the section with all fields, each study's as its own model writes them.

    Raises:
        ValueError: there is no such study, or a field is wrong.
    """
    known = {study.name: study for study in studies() if study.predicts}
    checked = {}
    for name, fields in stated.items():
        if name not in known:
            raise ValueError(f"unknown key {name!r}; allowed: {', '.join(known)}")
        try:
            checked[name] = known[name].module("predictions").Predictions.model_validate(fields).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise ValueError(f"{place} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
    return checked


def default_predictions() -> dict[str, Any]:
    """Return the predictions of the shipped presets, for tables without a preset."""
    return {study.name: study.module("predictions").DEFAULT.model_dump() for study in studies() if study.predicts}
