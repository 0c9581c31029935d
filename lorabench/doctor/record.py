"""What was measured on a machine: the record of `lorabench doctor`, and the speed by which a plan states times.

`results/doctor/<device>.json` holds the last record of each device. Finished runs say most about the speed of a preset,
then the record of a GPU. On a CPU whose speed in bf16 is not known yet, it is measured by the first plan in about a
second, since it differs by a factor of 100 between processors. No torch is imported unless it is measured now.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lorabench.config.execution import Execution
from lorabench.config.fields import PositiveFloat, Strict
from lorabench.config.loading import PRESETS, load_preset
from lorabench.errors import UserError
from lorabench.planning.plan import Plan, make_plan
from lorabench.planning.speed import Calibration, calibrate, on_gpu, planned_runs, with_gflops
from lorabench.store.layout import Layout
from lorabench.utils.files import write_json
from lorabench.utils.formats import number
from lorabench.utils.gpus import is_called, processor

RESULTS = Path("results")
FOLDER = RESULTS / "doctor"
"""The folder of the records, which presets share."""

_COLUMNS = ("run_id", "status", "device", "wall_s", "peak_mem_bytes")

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Check(Strict):
    """The result of one check."""

    name: str = ""
    status: Literal["pass", "fail", "measured", "skipped"]
    """`measured` is a number without a limit; `skipped` says that the check could not be made."""
    sentence: str
    """What was seen, or why the check failed or was skipped, in one sentence."""
    value: Finite | None = None
    """The measured number; null where there is none."""
    planned: Finite | None = None
    """The number that the plan states or the limit that the check has; null where there is none."""
    unit: str = ""
    """The unit of both numbers."""


def judged(passed: bool, sentence: str) -> Check:
    """Return a check without a number."""
    return Check(status="pass" if passed else "fail", sentence=sentence)


def skipped(reason: str) -> Check:
    """Return a check that can't be made."""
    return Check(status="skipped", sentence=reason)


def measured(value: float, unit: str, sentence: str, planned: float | None = None, passed: bool | None = None) -> Check:
    """Return a check of a number, which fails if the number is not finite.

    Args:
        planned: the number that the plan states, or the limit.
        passed: whether the number is within its limit; None without a limit.
    """
    if not math.isfinite(value):
        return Check(status="fail", sentence=f"{sentence}, and the number is {value}", planned=planned, unit=unit)
    status: Literal["pass", "fail", "measured"] = "measured"
    if passed is not None:
        status = "pass" if passed else "fail"
    return Check(status=status, sentence=sentence, value=value, planned=planned, unit=unit)


class Record(Strict):
    """What `lorabench doctor` found on a machine."""

    date: str
    """When the checks began, in UTC."""
    preset: str
    device: str
    """Torch's name of the GPU, or the name of the processor."""
    gpu: str | None
    """The GPU that the preset names (`execution.gpu`); null for a CPU."""
    host: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Seconds that all checks took."""
    git_sha: str | None
    """The commit of the code; null for an installed package."""
    packages: dict[str, str]
    """Versions of packages, by name."""
    gflops: PositiveFloat | None
    """Useful GFLOP/s of a training step by the plan's formula; null where it was not measured."""
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "fail"]

    @property
    def sentence(self) -> str:
        """The sentence about the speed for `lorabench plan`."""
        failed = f"; {len(self.failed)} of its {len(self.checks)} checks failed" if self.failed else ""
        speed = f"{number(self.gflops)} GFLOP/s in training steps"
        return f"measured by lorabench doctor on {self.device} on {self.date[:10]}: {speed}{failed}"


class Speed(Strict):
    """The speed of a preset's training steps on a machine's CPU, in `results/PRESET/speed.json`."""

    date: str
    """When it was measured, in UTC."""
    device: str
    """The name of the processor."""
    threads: Annotated[int, Field(ge=1)]
    bf16_products: Literal["native", "fp32"] | None
    """How matrices were multiplied in bf16; null in fp32."""
    gflops: PositiveFloat
    """Useful GFLOP/s of a training step by the plan's formula."""

    @property
    def sentence(self) -> str:
        """The sentence about the speed for `lorabench plan`."""
        way = "; bf16 products are computed in fp32 and rounded, since this is faster here"
        return (
            f"measured in a few training steps on {self.device} on {self.date[:10]}: {number(self.gflops)} GFLOP/s"
            f" with {self.threads} thread{'s' if self.threads > 1 else ''}{way if self.bf16_products == 'fp32' else ''}"
        )


def write_record(record: Record) -> Path:
    """Write a record to the file of its device, whole or not at all, and return the file."""
    path = FOLDER / f"{re.sub(r'[^A-Za-z0-9.]+', '-', record.device).strip('-')}.json"
    write_json(record.model_dump(), path)
    return path


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: the file can't be read, or is no record of this version of the schema.
    """
    advice = "delete it, and run lorabench doctor again"
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {advice}") from error
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise UserError(f"{path} is no record of this version of lorabench doctor ({reason}); {advice}") from error


def record_for(execution: Execution) -> Record | None:
    """Return the latest record of the device that a preset names, or for a preset on a CPU of this processor.

    Raises:
        UserError: a file in the folder of records is damaged or foreign.
    """
    records = [read_record(path) for path in sorted(FOLDER.glob("*.json"))]
    fitting = [record for record in records if _is_device_of(record.device, execution.gpu)]
    return max(fitting, key=lambda record: record.date, default=None)


def _is_device_of(device: str, gpu: str | None) -> bool:
    """Return whether a device is the named GPU, or without a name this machine's processor."""
    return device == processor() if gpu is None else is_called(gpu, device)


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
    devices = [device for device, _ in counted if (gpu is None and folders) or _is_device_of(device, gpu)]
    result = calibrate(known, sweeps, devices[0]) if devices else None
    if result is None and folders:
        place = ", ".join(str(folder) for folder in folders)
        raise UserError(f"{place}: no finished run of this preset was made on {gpu or 'a CPU'}")
    return result


def _named_plans(folders: Sequence[Path], plan: Plan) -> Iterator[Plan]:
    """Yield the plans of the shipped presets that folders (results/NAME/tables) are named for, on the plan's GPU."""
    gpu = plan.preset.execution.gpu
    for name in dict.fromkeys(folder.resolve().parent.name for folder in folders):
        if (PRESETS / f"{name}.yaml").is_file():
            preset = load_preset(name)
            if (preset.execution.gpu is None) == (gpu is None):
                yield make_plan(on_gpu(preset, gpu) if gpu else preset)
