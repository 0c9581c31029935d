"""The cost model against runs that were measured: the speed that fits them, and how far off it is then."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lorabench import cost
from lorabench.bill import on_gpu
from lorabench.config import Preset
from lorabench.errors import UserError
from lorabench.gpus import is_called, processor
from lorabench.lanes import lanes_of
from lorabench.memory import gpus_needed, peak_bytes

if TYPE_CHECKING:
    from lorabench.plan import Plan, Sweep

RESULTS = Path("results")
_COLUMNS = ("run_id", "status", "device", "wall_s", "peak_mem_bytes")


@dataclass(frozen=True)
class Error:
    """Predicted over measured: the median of the runs, and the two that are furthest off on either side."""

    median: float
    lowest: float
    highest: float

    @property
    def worst(self) -> float:
        """The factor by which the worst run is off, at least 1."""
        return max(self.highest, 1 / self.lowest)


@dataclass(frozen=True)
class Calibration:
    """What measured runs say about a device."""

    device: str
    runs: int
    gflops: float
    """Useful GFLOP/s of a job on a CPU, of one GPU: the predicted FLOPs of all runs over their seconds."""
    time: Error
    memory: Error

    @property
    def sentence(self) -> str:
        """For a reader."""
        return (
            f"measured on {self.runs} runs on {self.device}: {self.gflops:,.3g} GFLOP/s; predicted over measured, "
            f"median and range: time {_ratios(self.time)}, memory {_ratios(self.memory)}"
        )


def calibrate(
    runs: Sequence[Mapping[str, Any]], sweeps: Mapping[str, tuple[Preset, Sweep]], device: str
) -> Calibration | None:
    """Fit the speed to the finished runs of a device; None if there are none.

    Args:
        runs: rows of a table `runs`: run_id, status, device, wall_s, peak_mem_bytes.
        sweeps: the preset and the sweep of each run that is known, by run_id (see `planned_runs`).
        device: as the table calls it.
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
        of_flops, of_launches = cost.run_seconds(preset, sweep, gpus)
        work.append(of_flops * cost.speed(preset.execution))
        fixed.append(of_launches)
    seconds = [seconds for *_, seconds, _ in measured]
    # What is launched one by one is an assumption; of what was measured it is never all.
    computing = [max(of_run - launches, of_run / 2) for of_run, launches in zip(seconds, fixed, strict=True)]
    speed = sum(work) / sum(computing)
    times = [(flops / speed + rest) / of_run for flops, rest, of_run in zip(work, fixed, seconds, strict=True)]
    memory = [
        peak_bytes(preset, sweep, gpus, lanes_of(preset, sweep, gpus)) / peak
        for preset, sweep, gpus, _, peak in measured
        if peak > 0
    ]
    return Calibration(device, len(measured), speed / 1e9, _error(times), _error(memory or [math.nan]))


def _gpus(preset: Preset, sweep: Sweep) -> int:
    """GPUs of a run's job: it ran, so it had some, even if the estimate finds no room."""
    try:
        return gpus_needed(preset, sweep)
    except UserError:
        return preset.execution.max_gpus


def planned_runs(plans: Sequence[Plan]) -> dict[str, tuple[Preset, Sweep]]:
    """Every run that plans may come to, by run_id: the grids, and the further seeds at any of their LRs."""
    return {
        run.run_id: (plan.preset, sweep)
        for plan in plans
        for sweep in plan.sweeps
        for run in (*sweep.grid(), *(run for lr in sweep.lrs for run in sweep.repeats(lr)))
    }


def measure(plan: Plan, folders: Sequence[Path]) -> Calibration | None:
    """Calibrate on the tables of some folders, or without any on those under results/, for the plan's device.

    The device is the preset's GPU; of a CPU preset this machine's processor, or with named folders the one that most
    of their runs were made on.

    Raises:
        UserError: a named folder has no run that a plan knows, on such a device.
    """
    found = list(folders) or sorted({path.parent for path in RESULTS.glob("*/tables/runs.*")})
    if not found:
        return None
    from lorabench.tables import read_rows

    runs = {row["run_id"]: row for folder in reversed(found) for row in read_rows(folder, "runs", _COLUMNS)}
    sweeps = planned_runs([plan, *_named_plans(found, plan)])
    known = [row for run_id, row in runs.items() if run_id in sweeps]
    gpu = plan.preset.execution.gpu
    counted = Counter(row["device"] for row in known if row["device"]).most_common()
    devices = [device for device, _ in counted if _is(device, gpu, anywhere=bool(folders))]
    result = calibrate(known, sweeps, devices[0]) if devices else None
    if result is None and folders:
        place = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{place}: no finished run of this preset was made on {gpu or 'a CPU'}")
    return result


def calibrated(preset: Preset, measured: Calibration) -> Preset:
    """The preset with the speed that was measured."""
    execution = preset.execution.model_copy(update={"gflops": measured.gflops})
    return preset.model_copy(update={"execution": execution})


def _is(device: str, gpu: str | None, anywhere: bool) -> bool:
    if gpu is not None:
        return is_called(gpu, device)
    return anywhere or device == processor()


def _named_plans(folders: Sequence[Path], plan: Plan) -> Iterator[Plan]:
    """The plans of shipped presets whose results the folders are (results/NAME/tables), on the plan's GPU."""
    from lorabench.config import PRESETS, load_preset
    from lorabench.plan import make_plan

    for name in dict.fromkeys(folder.resolve().parent.name for folder in folders):
        if (PRESETS / f"{name}.yaml").is_file():
            preset, gpu = load_preset(name), plan.preset.execution.gpu
            if (preset.execution.gpu is None) == (gpu is None):
                yield make_plan(on_gpu(preset, gpu) if gpu else preset)


def _error(ratios: Sequence[float]) -> Error:
    return Error(median(ratios), min(ratios), max(ratios))


def _ratios(error: Error) -> str:
    return f"{error.median:.2f} ({error.lowest:.2f} to {error.highest:.2f})"
