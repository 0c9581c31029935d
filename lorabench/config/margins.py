"""The sections `margins` and `predictions` of a preset: the smallest effects that matter, and what studies predict.

Both are written down before the runs; predictions are judged like claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from lorabench.config.fields import Strict
from lorabench.utils.files import WORKFLOW
from lorabench.utils.studies import studies
from lorabench.utils.yaml_files import read_yaml


class Margins(Strict):
    """The smallest effects of interest. Differences below them count as none, so a claim of equality is judged within
    them, and a claim of a difference must exceed them."""

    loss: Annotated[float, Field(gt=0, lt=1)]
    """For losses of SFT: a share of the fall of the loss from the base to full fine-tuning."""
    final_loss: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """For losses of SFT, too: a share of the final loss of full fine-tuning. The smaller margin holds, since on a
    task that is almost solved nearly all of the fall is the format of the answers."""
    reward: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """For accuracies, such as those of RL: a difference."""
    lr_factor: Annotated[float, Field(gt=1, le=1e20)]
    """For optimal LRs: the factor up to which two count as the same."""


SHARE_OF_LOSS = 0.01
"""The margin of a loss, as a share of it, where the loss of the base is not known."""

DEFAULT_MARGINS = Margins.model_validate(read_yaml(WORKFLOW / "presets/suites/margins.yaml")["margins"])
"""The margins of the shipped presets, for tables without a preset."""

Predictions = Mapping[str, Any]
"""By study, what is predicted, as plain data with all fields of the study's model `Predictions`."""


def checked_predictions(stated: Predictions) -> dict[str, Any]:
    """Return the section with all fields of each study's model; ValueError if a study or a field is wrong."""
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
