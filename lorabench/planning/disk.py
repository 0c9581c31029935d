"""The disk space of a sweep, in bytes: what it keeps, and what it needs besides while it is trained."""

from __future__ import annotations

from lorabench.config.preset import Preset
from lorabench.models.dimensions import dimensions
from lorabench.planning.memory import trained_parameters
from lorabench.runs import Sweep

_WEIGHT, _STATE = 4, 12
"""Bytes of a trained parameter in kept weights, and in a checkpoint, which also has Adam's two moments."""


def kept_bytes(preset: Preset, sweep: Sweep) -> int:
    """Return the bytes of the weights that are kept when a sweep is done."""
    kept = sweep.most_runs if preset.execution.keep_weights == "all" else sweep.seeds.best
    return _WEIGHT * kept * _trained(preset, sweep)


def working_bytes(preset: Preset, sweep: Sweep, lanes: int) -> int:
    """Return the most bytes that a sweep needs beside `kept_bytes` while `lanes` of its runs are trained together.

    They are the weights of all runs, which are kept until the best LR is known, and the checkpoints, of which there are
    two while one replaces the other.
    """
    weights = _WEIGHT * sweep.most_runs * _trained(preset, sweep) - kept_bytes(preset, sweep)
    return weights + 2 * lanes * checkpoint_bytes(preset, sweep)


def checkpoint_bytes(preset: Preset, sweep: Sweep) -> int:
    """Return the bytes of a checkpoint of one run."""
    return _STATE * _trained(preset, sweep)


def _trained(preset: Preset, sweep: Sweep) -> int:
    condition = sweep.condition
    return trained_parameters(preset, dimensions(preset.models[condition.model]), condition.rank, condition.placement)
