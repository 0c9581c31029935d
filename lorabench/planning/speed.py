"""The speed of a machine: taken from another GPU's data sheet, or measured, in place of the one that a preset has.

`calibrate` measures it on finished runs, with the errors that the estimates of time and memory then have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.planning.memory import gpus_needed, peak_bytes, sweep_memory
from lorabench.planning.plan import Plan
from lorabench.planning.seconds import flops_per_second, run_seconds
from lorabench.runs import Sweep
from lorabench.utils.gpus import GPUS


def on_gpu(preset: Preset, gpu: str) -> Preset:
    """Return the preset with another GPU, and without its `gflops`, which hold for its own GPU.

    Raises:
        UserError: the GPU is unknown.
    """
    if gpu not in GPUS:
        raise UserError(f"gpu {gpu!r} is not known; allowed: {', '.join(GPUS)}")
    execution = preset.execution.model_copy(update={"gpu": gpu, "gflops": None})
    return preset.model_copy(update={"execution": execution})


def with_gflops(preset: Preset, gflops: float) -> Preset:
    """Return the preset with a measured speed, in useful GFLOP/s of a job on a CPU or of one GPU."""
    execution = preset.execution.model_copy(update={"gflops": gflops})
    return preset.model_copy(update={"execution": execution})


@dataclass(frozen=True)
class Calibration:
    """The cost model's speed, fitted to the measured runs of a device, and the ratios of predicted to measured values
    of each run."""

    device: str
    gflops: float
    """Useful GFLOP/s of a job on a CPU, or of one GPU: the predicted FLOPs of all runs over their seconds."""
    time: Sequence[float]
    memory: Sequence[float]
    """It is empty where no run knows its memory."""

    @property
    def sentence(self) -> str:
        """What was measured, for `lorabench plan`."""
        time, memory = (
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "unknown"
            for ratios in (self.time, self.memory)
        )
        return (
            f"measured on {len(self.time)} runs on {self.device}: {self.gflops:,.3g} GFLOP/s; predicted over measured, "
            f"median and range: time {time}, memory {memory}"
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
    flops, fixed, walls, memory = [], [], [], []
    for run in runs:
        if run["run_id"] not in sweeps or (run["status"], run["device"]) != ("done", device) or not run["wall_s"]:
            continue
        preset, sweep = sweeps[run["run_id"]]
        try:
            gpus = gpus_needed(preset, sweep)
        except UserError:
            # By the estimate it does not fit, and yet it ran.
            gpus = preset.execution.max_gpus
        computing, waiting = run_seconds(preset, sweep, gpus)
        flops.append(computing * flops_per_second(preset.execution))
        fixed.append(waiting)
        walls.append(run["wall_s"])
        if run["peak_mem_bytes"]:
            # A run reports its own process; the engine vLLM is another one.
            own = peak_bytes(preset, sweep, gpus) - sweep_memory(preset, sweep, max(1, gpus)).engine
            memory.append(own / run["peak_mem_bytes"])
    if not walls:
        return None
    # The fixed seconds are an assumption, so they never count as more than half of a run's measured seconds.
    speed = sum(flops) / sum(max(wall - waiting, wall / 2) for wall, waiting in zip(walls, fixed, strict=True))
    time = [(work / speed + waiting) / wall for work, waiting, wall in zip(flops, fixed, walls, strict=True)]
    return Calibration(device, speed / 1e9, time, memory)


def planned_runs(plans: Sequence[Plan]) -> dict[str, tuple[Preset, Sweep]]:
    """Return the preset and sweep of every run that plans may contain, by run_id, whichever LRs prove the best."""
    return {run_id: (plan.preset, sweep) for plan in plans for sweep in plan.sweeps for run_id in sweep.run_ids}
