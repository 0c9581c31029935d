"""Shipped presets with other settings."""

from __future__ import annotations

from typing import Any

from lorabench.config.experiments import SeedNumbers
from lorabench.config.preset import Preset


def with_model(preset: Preset, **changes: Any) -> Preset:
    """A GPU preset that has only the experiment `rank`, on one model."""
    experiments = preset.experiments.model_copy(update=dict.fromkeys(preset.experiments.chosen()))
    block = preset.experiments.rank[0].model_copy(update={"seeds": SeedNumbers(), **changes})
    experiments = experiments.model_copy(update={"rank": [block]})
    return preset.model_copy(update={"experiments": experiments, "evaluation": None})
