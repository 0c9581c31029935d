"""The speed of a machine, by which `lorabench plan` states times; imports no torch unless the speed is measured now.

Finished runs say most about a preset, then what `lorabench doctor` measured on a GPU. On a CPU whose speed in bf16 is
not known yet, it is measured now in about a second, since it differs by a factor of 100 between processors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from lorabench.config.loading import PRESETS, load_preset
from lorabench.doctor.record import Record, Speed, record_for
from lorabench.errors import UserError
from lorabench.planning.plan import Plan, make_plan
from lorabench.planning.speed import Calibration, calibrate, on_gpu, planned_runs, with_gflops
from lorabench.store.layout import Layout
from lorabench.utils.gpus import is_called, processor

RESULTS = Path("results")
_COLUMNS = ("run_id", "status", "device", "wall_s", "peak_mem_bytes")


def at_measured_speed(plan: Plan, layout: Layout, folders: Sequence[Path]) -> tuple[Plan, list[str]]:
    """Return a plan with the speeds that were measured, and sentences that say where they come from.

    Args:
        plan: the plan.
        layout: the paths of the preset's files.
        folders: folders of tables of finished runs; if empty, all under results/.

    Raises:
        UserError: see `speed_of_runs` and `record_for`.
    """
    execution = plan.preset.execution
    speed: Calibration | Record | Speed | None = speed_of_runs(plan, folders)
    if speed is None and execution.gpu is not None:
        speed = record_for(execution)
    elif speed is None:
        speed = read_speed(layout.speed, execution.threads)
        if speed is None and plan.preset.protocol.precision == "bf16":
            from lorabench.doctor.bench import measure_speed

            speed = measure_speed(plan, layout)
    if speed is None or speed.gflops is None:
        return plan, []
    return make_plan(with_gflops(plan.preset, speed.gflops)), [speed.sentence]


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
    sweeps = planned_runs([plan, *_named_plans(tables, plan)])
    known = [row for run_id, row in runs.items() if run_id in sweeps]
    gpu = plan.preset.execution.gpu
    counted = Counter(row["device"] for row in known if row["device"]).most_common()
    devices = [device for device, _ in counted if _is_of_kind(device, gpu, anywhere=bool(folders))]
    result = calibrate(known, sweeps, devices[0]) if devices else None
    if result is None and folders:
        place = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{place}: no finished run of this preset was made on {gpu or 'a CPU'}")
    return result


def _is_of_kind(device: str, gpu: str | None, anywhere: bool) -> bool:
    """Return whether a device is the named GPU, or without a name this machine's CPU or, if `anywhere`, any device."""
    if gpu is not None:
        return is_called(gpu, device)
    return anywhere or device == processor()


def _named_plans(folders: Sequence[Path], plan: Plan) -> Iterator[Plan]:
    """Yield the plans of the shipped presets that folders (results/NAME/tables) are named for, on the plan's GPU."""
    for name in dict.fromkeys(folder.resolve().parent.name for folder in folders):
        if (PRESETS / f"{name}.yaml").is_file():
            preset, gpu = load_preset(name), plan.preset.execution.gpu
            if (preset.execution.gpu is None) == (gpu is None):
                yield make_plan(on_gpu(preset, gpu) if gpu else preset)
