"""The options of `lorabench claims`: margins of verdicts, predictions of theories, and seed noise from elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.optima import pooled_noise
from lorabench.config.loading import read_margins
from lorabench.config.margins import Margins
from lorabench.config.predictions import LrRatioPredictions, Predictions
from lorabench.errors import UserError
from lorabench.store.layout import Layout
from lorabench.store.tables import Tables


def margins_of(preset: str | None, path: Path | None) -> Margins | None:
    """Return the margins of a preset or of a YAML file; None if neither is given.

    Raises:
        UserError: both are given, or what is given can't be read.
    """
    if preset is not None and path is not None:
        raise UserError("--preset and --margins: give one of them, since the preset states margins too")
    if preset is not None:
        return Layout.of(preset).preset.margins
    return None if path is None else read_margins(path)


def predictions_of(preset: str | None) -> Predictions | None:
    """Return what the theories of a preset predict, nothing if it has no such section; None without a preset."""
    if preset is None:
        return None
    return Layout.of(preset).preset.predictions or Predictions(lr_ratio=LrRatioPredictions())


def noise_of(folder: Path | None, sd: float | None, dof: int | None, source: str | None) -> Noise | None:
    """Return seed noise from the tables in a folder, or from a number with its source; None if none is given.

    Raises:
        UserError: both are given, a part of the number is missing or wrong, or the tables have no repeated seeds.
    """
    if sd is None:
        if dof is not None or source is not None:
            raise UserError("--noise-dof and --noise-source describe --noise-sd, which is missing")
        return None if folder is None else pooled_noise(Tables.read(folder).runs, str(folder))
    if folder is not None:
        raise UserError("--noise and --noise-sd: give one of them")
    if dof is None or source is None or not source.strip():
        raise UserError("--noise-sd needs --noise-dof and --noise-source, which say how well it is known and by whom")
    if not (math.isfinite(sd) and sd > 0):
        raise UserError(f"--noise-sd {sd}: allowed: numbers above 0, in nats")
    if dof < 1:
        raise UserError(f"--noise-dof {dof}: allowed: whole numbers from 1 up")
    return Noise(sd, dof, source)
