"""Every run is trained alone; a stand-in until the trainers have no lanes either."""

from __future__ import annotations

from collections.abc import Iterable

from lorabench.config.preset import Preset
from lorabench.runs import Run, Sweep


def lane_count(preset: Preset, sweep: Sweep, gpus: int) -> int:
    """Return 1."""
    return 1


def deal(preset: Preset, runs: Iterable[Run], lanes: int) -> list[list[Run]]:
    """Return each run as a group of its own."""
    return [[run] for run in runs]
