"""The speed of a machine, by which `lorabench plan` states times; imports no torch unless the speed is measured now.

Finished runs say most about a preset, then what `lorabench doctor` measured on a GPU. On a CPU whose speed in bf16 is
not known yet, it is measured now in about a second, since it differs by a factor of 100 between processors. Where
nothing was measured, the preset's `gflops` holds, or what lorabench/utils/gpus.py assumes of the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from lorabench.config.loading import PRESETS, load_preset
from lorabench.config.preset import Preset
from lorabench.doctor.record import Record, Speed, record_for
from lorabench.errors import UserError
from lorabench.planning.memory import gpus_needed, peak_bytes, sweep_memory
from lorabench.planning.plan import Plan, make_plan
from lorabench.planning.seconds import flops_per_second, run_seconds
from lorabench.runs import Sweep
from lorabench.store.layout import Layout
from lorabench.utils.gpus import GPUS, is_called, processor

RESULTS = Path("results")
_COLUMNS = ("run_id", "status", "device", "wall_s", "peak_mem_bytes")


def speed_of(plan: Plan, layout: Layout, folders: Sequence[Path]) -> Calibration | Record | Speed | None:
    """Return the measured speed of the machine that a plan is for; None if none is known.

    Args:
        plan: the plan.
        layout: the paths of the preset's files.
        folders: folders of tables of finished runs; if empty, all under results/.

    Raises:
        UserError: see `speed_of_runs` and `record_for`.
    """
    execution = plan.preset.execution
    if (speed := speed_of_runs(plan, folders)) is not None:
        return speed
    if execution.gpu is not None:
        record = record_for(execution)
        return None if record is None or record.gflops is None else record
    if (kept := read_speed(layout.speed, execution.threads)) is not None:
        return kept
    if plan.preset.protocol.precision != "bf16":
        return None
    from lorabench.doctor.bench import measure_speed

    return measure_speed(plan, layout)


def on_gpu(preset: Preset, gpu: str) -> Preset:
    """Return the preset with another GPU, and without its `gflops`, which hold for its own GPU.

    Raises:
        UserError: the GPU is unknown.
    """
    if gpu not in GPUS:
        raise UserError(f"gpu {gpu!r} is not known; allowed: {', '.join(GPUS)}")
    return preset.with_execution(gpu=gpu, gflops=None)


def read_speed(path: Path, threads: int) -> Speed | None:
    """Return the kept speed; None if none is kept, or one of another processor or number of threads, or a damaged one.

    It takes a second to measure again.
    """
    try:
        speed = Speed.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return speed if (speed.device, speed.threads) == (processor(), threads) else None


def speed_of_runs(plan: Plan, folders: Sequence[Path]) -> Calibration | None:
    """Calibrate the cost model on tables of runs, for the plan's device.

    The device is the preset's GPU. For a CPU preset it is this machine's processor, or with named folders the processor
    of most of their runs.

    Args:
        folders: folders of tables; if empty, all under results/.

    Returns:
        None if no folder is named and there is no suitable run under results/.

    Raises:
        UserError: the named folders have no finished run that a plan knows, on such a device.
    """
    tables = list(folders) or sorted({path.parent for path in RESULTS.glob("*/tables/runs.*")})
    if not tables:
        return None

    # Imported here, since a plan without measured runs starts faster without numpy and pyarrow.
    from lorabench.store.io import read_rows

    runs = {row["run_id"]: row for folder in reversed(tables) for row in read_rows(folder, "runs", _COLUMNS)}
    plans, gpu = [plan], plan.preset.execution.gpu
    # Folders (results/NAME/tables) are named for shipped presets, which are planned on the same GPU.
    for name in dict.fromkeys(folder.resolve().parent.name for folder in tables):
        if (PRESETS / f"{name}.yaml").is_file():
            preset = load_preset(name)
            if (preset.execution.gpu is None) == (gpu is None):
                plans.append(make_plan(on_gpu(preset, gpu) if gpu else preset))
    sweeps = planned_runs(plans)
    known = [row for run_id, row in runs.items() if run_id in sweeps]
    counted = Counter(row["device"] for row in known if row["device"]).most_common()
    fits = [name for name, _ in counted if (is_called(gpu, name) if gpu else folders or name == processor())]
    result = calibrate(known, sweeps, fits[0]) if fits else None
    if result is None and folders:
        place = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{place}: no finished run of this preset was made on {gpu or 'a CPU'}")
    return result


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
