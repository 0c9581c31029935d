"""Calibration of the cost model on measured runs: the speed that fits them, and the errors that remain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.planning.lane_count import lane_count
from lorabench.planning.memory import gpus_needed, reported_bytes
from lorabench.planning.plan import Plan
from lorabench.planning.seconds import flops_per_second, run_seconds
from lorabench.runs import Sweep


@dataclass(frozen=True)
class PredictionError:
    """The ratio of predicted to measured values over runs: its median, smallest and largest value."""

    median: float
    lowest: float
    highest: float

    @property
    def worst(self) -> float:
        """The factor by which the worst prediction is too high or too low, at least 1."""
        return max(self.highest, 1 / self.lowest)


@dataclass(frozen=True)
class Calibration:
    """The cost model's speed and errors, fitted to the measured runs of a device."""

    device: str
    runs: int
    gflops: float
    """Useful GFLOP/s of a job on a CPU, or of one GPU: the predicted FLOPs of all runs over their seconds."""
    time: PredictionError
    memory: PredictionError

    @property
    def sentence(self) -> str:
        """The calibration in words, for `lorabench plan`."""
        return (
            f"measured on {self.runs} runs on {self.device}: {self.gflops:,.3g} GFLOP/s; predicted over measured, "
            f"median and range: time {_ratios(self.time)}, memory {_ratios(self.memory)}"
        )


def calibrate(
    runs: Sequence[Mapping[str, Any]], sweeps: Mapping[str, tuple[Preset, Sweep]], device: str
) -> Calibration | None:
    """Fit the speed to the finished runs of a device.

    Args:
        runs: rows of a table `runs`, with run_id, status, device, wall_s (seconds) and peak_mem_bytes.
        sweeps: the preset and the sweep of each known run, by run_id (see `planned_runs`).
        device: the device's name in the table.

    Returns:
        None if none of the runs is known, finished, timed and of that device.
    """
    measured = [
        (*sweeps[run["run_id"]], _gpus(*sweeps[run["run_id"]]), run["wall_s"], run["peak_mem_bytes"] or 0)
        for run in runs
        if run["run_id"] in sweeps and (run["status"], run["device"]) == ("done", device) and (run["wall_s"] or 0) > 0
    ]
    if not measured:
        return None
    work, fixed = [], []
    for preset, sweep, gpus, _, _ in measured:
        computing_seconds, fixed_seconds = run_seconds(preset, sweep, gpus)
        work.append(computing_seconds * flops_per_second(preset.execution))
        fixed.append(fixed_seconds)
    seconds = [seconds for *_, seconds, _ in measured]
    # The fixed seconds are an assumption, so they never count as more than half of a run's measured seconds.
    computing = [max(wall - launches, wall / 2) for wall, launches in zip(seconds, fixed, strict=True)]
    speed = sum(work) / sum(computing)
    times = [(flops / speed + launches) / wall for flops, launches, wall in zip(work, fixed, seconds, strict=True)]
    memory = [
        reported_bytes(preset, sweep, gpus, lane_count(preset, sweep, gpus)) / peak
        for preset, sweep, gpus, _, peak in measured
        if peak > 0
    ]
    return Calibration(device, len(measured), speed / 1e9, _error(times), _error(memory or [math.nan]))


def _gpus(preset: Preset, sweep: Sweep) -> int:
    """Return the GPUs of a measured run's job: `max_gpus` where by the estimate it does not fit, since it ran."""
    try:
        return gpus_needed(preset, sweep)
    except UserError:
        return preset.execution.max_gpus


def planned_runs(plans: Sequence[Plan]) -> dict[str, tuple[Preset, Sweep]]:
    """Return the preset and sweep of every run that plans may contain, by run_id, whichever LRs prove the best."""
    return {
        run.run_id: (plan.preset, sweep) for plan in plans for sweep in plan.sweeps for run in sweep.possible_runs()
    }


def with_gflops(preset: Preset, gflops: float) -> Preset:
    """Return the preset with a measured speed, in useful GFLOP/s of a job on a CPU or of one GPU."""
    execution = preset.execution.model_copy(update={"gflops": gflops})
    return preset.model_copy(update={"execution": execution})


def _error(ratios: Sequence[float]) -> PredictionError:
    return PredictionError(median(ratios), min(ratios), max(ratios))


def _ratios(error: PredictionError) -> str:
    return f"{error.median:.2f} ({error.lowest:.2f} to {error.highest:.2f})"
