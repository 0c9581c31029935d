"""The result of `lorabench doctor`: a record of checks, and its file for each device; imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lorabench.config.execution import Execution
from lorabench.config.fields import PositiveFloat, Strict
from lorabench.errors import UserError
from lorabench.utils.files import write_json
from lorabench.utils.formats import number
from lorabench.utils.gpus import is_called, processor

FOLDER = Path("results/doctor")
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Check(Strict):
    """The result of one check, with a sentence on what was seen, or why it failed or was skipped.

    `measured` is a number without a limit. `value` is the measured number, `planned` that of the plan or the limit.
    """

    name: str = ""
    status: Literal["pass", "fail", "measured", "skipped"]
    sentence: str
    value: Finite | None = None
    planned: Finite | None = None
    unit: str = ""


class Record(Strict):
    """The checks of a machine by `lorabench doctor`, and its speed.

    `date` is when they began, `device` torch's name of the GPU or the processor's name, `gpu` the preset's
    `execution.gpu`, `gflops` the useful GFLOP/s of a training step by the plan's formula, if it was measured, and
    `gpu_time` its seconds on a GPU over those of the plan.
    """

    date: str
    preset: str
    device: str
    gpu: str | None
    host: str
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    git_sha: str | None
    packages: dict[str, str]
    gflops: PositiveFloat | None
    gpu_time: PositiveFloat | None = None
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
        speed += f", {number(self.gpu_time)} times the plan's seconds" if self.gpu_time else ""
        return f"measured by lorabench doctor on {self.device} on {self.date[:10]}: {speed}{failed}"


def write_record(record: Record) -> Path:
    """Write a record to the file of its device, whole or not at all, and return the file."""
    path = FOLDER / f"{re.sub(r'[^A-Za-z0-9.]+', '-', record.device).strip('-')}.json"
    write_json(record.model_dump(), path)
    return path


def record_for(execution: Execution) -> Record | None:
    """Return the latest record of the device that a preset names, or for a preset on a CPU of this processor.

    UserError says that a file in the folder of records can't be read, or is no record of this version of the schema.
    """
    gpu, fitting = execution.gpu, []
    for path in sorted(FOLDER.glob("*.json")):
        try:
            record = Record.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{path} is no record of this version: delete it, run lorabench doctor again") from error
        if is_called(gpu, record.device) if gpu else record.device == processor():
            fitting.append(record)
    return max(fitting, key=lambda record: record.date, default=None)
