"""The result of `lorabench doctor`: a record of checks, and the file that holds it; imports no torch.

`results/doctor/<device>.json` holds the last record of each device. This is the only module that reads or writes it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lorabench.config.execution import Execution
from lorabench.config.fields import PositiveFloat, Strict
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.utils.files import write_json
from lorabench.utils.formats import number
from lorabench.utils.gpus import is_called, processor

FOLDER = Path("results/doctor")
"""The folder of the records, which presets share."""

VERSION: Literal[1] = 1
"""The version of the file's schema; a file of another version is refused."""

Status = Literal["pass", "fail", "measured", "skipped"]
"""The verdict of a check. `measured` is a number without a limit; `skipped` says that the check could not be made."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Check(Strict):
    """The result of one check."""

    name: str
    status: Status
    sentence: str
    """What was found, or why it failed or was skipped, in one sentence."""
    value: Finite | None = None
    """The measured number; null where there is none."""
    planned: Finite | None = None
    """The number that the plan states or the limit that the check has; null where there is none."""
    unit: str = ""
    """The unit of both numbers."""


class Record(Strict):
    """What `lorabench doctor` found on a machine."""

    version: Literal[1] = VERSION
    date: str
    """When the checks began, in UTC."""
    preset: str
    device: str
    """Torch's name of the GPU, or the name of the processor."""
    gpu: str | None
    """The GPU that the preset names (`execution.gpu`); null for a CPU."""
    host: str
    processes: Annotated[int, Field(ge=1)]
    """Processes of the check of several processes; 1 if there was none."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Seconds that all checks took."""
    git_sha: str | None
    """The commit of the code; null for an installed package."""
    packages: dict[str, str]
    """Versions of packages, by name."""
    gflops: PositiveFloat | None
    """Useful GFLOP/s of a training step by the plan's formula; null if only narrowed models were computed, which say
    nothing about the preset's."""
    layer_seconds: PositiveFloat | None
    """Seconds of a layer for each token while responses are drawn, beside reading weights; null if it is not known."""
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "fail"]

    def sentence(self, with_speed: bool, with_drawing: bool) -> str | None:
        """Return what a plan takes from the record, in words; None if it takes nothing.

        Args:
            with_speed: whether the plan takes the speed of training steps, which finished runs may give too.
            with_drawing: whether it takes that of this project's own sampler, the only one that was timed.
        """
        taken = [f"{number(self.gflops)} GFLOP/s in training steps"] if with_speed and self.gflops else []
        if with_drawing and self.layer_seconds is not None:
            taken.append(f"{number(1e3 * self.layer_seconds)} ms for a layer and token in drawing responses")
        if not taken:
            return None
        failed = f"; {len(self.failed)} of its {len(self.checks)} checks failed" if self.failed else ""
        return f"measured by lorabench doctor on {self.device} on {self.date[:10]}: {', '.join(taken)}{failed}"


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
        """The speed in words, for `lorabench plan`."""
        ways = {"native": "", "fp32": "; bf16 products are computed in fp32 and rounded, since this is faster here"}
        way = "" if self.bf16_products is None else ways[self.bf16_products]
        return (
            f"measured in a few training steps on {self.device} on {self.date[:10]}: {number(self.gflops)} GFLOP/s"
            f" with {self.threads} thread{'s' if self.threads > 1 else ''}{way}"
        )


def read_speed(path: Path, threads: int) -> Speed | None:
    """Return the kept speed; None if none is kept, or one of another processor or number of threads, or a damaged one.

    It takes a second to measure again.
    """
    try:
        speed = Speed.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return speed if (speed.device, speed.threads) == (processor(), threads) else None


def record_path(device: str) -> Path:
    """Return the file of a device's record."""
    return FOLDER / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device).strip('-')}.json"


def write_record(record: Record) -> Path:
    """Write a record to the file of its device, whole or not at all, and return the file."""
    path = record_path(record.device)
    write_json(record.model_dump(), path)
    return path


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        UserError: the file can't be read, is no record of this version, or is of another device than its name says.
    """
    advice = "delete it, and run lorabench doctor again"
    try:
        record = Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); {advice}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise UserError(f"{path} is no record of lorabench doctor, version {VERSION} ({reason}); {advice}") from error
    if record_path(record.device).name != path.name:
        raise UserError(f"{path} is of another device, {record.device!r}, than its name says; {advice}")
    return record


def record_for(execution: Execution) -> Record | None:
    """Return the latest record of the device that a preset names, or for a preset on a CPU of this processor.

    Raises:
        UserError: a file in the folder of records is damaged or foreign.
    """
    records = [read_record(path) for path in sorted(FOLDER.glob("*.json"))]
    fitting = [record for record in records if _is_of(record.device, execution.gpu)]
    return max(fitting, key=lambda record: record.date, default=None)


def with_measured_speed(preset: Preset, record: Record) -> Preset:
    """Return a GPU's preset with the speeds that a record knows in place of assumed ones; that of vLLM it does not
    know."""
    own = preset.execution.sampler == "own"
    speeds = {"gflops": record.gflops, "layer_seconds": record.layer_seconds if own else None}
    update = {name: value for name, value in speeds.items() if value is not None}
    return preset.model_copy(update={"execution": preset.execution.model_copy(update=update)})


def _is_of(device: str, gpu: str | None) -> bool:
    return device == processor() if gpu is None else is_called(gpu, device)
