"""A short sweep of FullFT and LoRA on the tiny base, trained by the commands of the workflow in processes of their own.

It is trained without an interruption, killed and resumed, and by several processes; the numbers must be the same.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.config.preset import Preset
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import Limits, write_tokens
from lorabench.doctor.limits import LOSS_SPREAD
from lorabench.doctor.record import Check
from lorabench.doctor.subprocesses import family, send, started, wait_until
from lorabench.doctor.verdict import at_most, decided
from lorabench.models.base import load_tokenizer, max_length
from lorabench.planning.plan import Plan, make_plan
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.utils.checked_tensors import read_header

PRESET = "short.yaml"
_SECONDS = 600.0
_MODEL, _DATASET = "tiny", "instruct"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A working directory with the preset of the short sweep in it."""

    folder: Path

    @cached_property
    def layout(self) -> Layout:
        """The paths of the preset's files, relative to the folder."""
        return Layout.of(str(self.folder / PRESET))

    @cached_property
    def plan(self) -> Plan:
        """The plan of the preset."""
        return make_plan(self.layout.preset)

    @property
    def job(self) -> Job:
        """The job that trains both sweeps."""
        return self.plan.jobs[0]

    def path(self, path: Path) -> Path:
        """Return a path of the layout within the folder."""
        return self.folder / path

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of runs in progress."""
        return list(self.path(self.layout.runs).glob("*.partial/checkpoint.safetensors"))

    def copy(self, name: str) -> Place:
        """Return a copy beside this folder."""
        return Place(Path(shutil.copytree(self.folder, self.folder.with_name(name))))

    def command(self, processes: int) -> list[str]:
        """Return the arguments of the command that trains the job."""
        return ["step", "train", self.job.job_id, "--preset", PRESET, "--processes", str(processes)]


class SweepError(Exception):
    """The short sweep could not be trained; the message is a sentence."""


def prepare(folder: Path, preset: Preset) -> Place:
    """Write the preset of the short sweep, with the precision and threads of another, and its data."""
    folder.mkdir()
    (folder / PRESET).write_text(yaml.safe_dump(_raw(preset), sort_keys=False))
    place = Place(folder)
    spec, layout = place.layout.preset.models[_MODEL], place.layout
    dataset = place.path(layout.dataset(_DATASET))
    build_dataset(layout.preset.datasets[_DATASET], dataset)
    write_tokens(dataset, load_tokenizer(spec), place.path(layout.tokens(_MODEL, _DATASET)), Limits(max_length(spec)))
    return place


def _raw(preset: Preset) -> dict[str, Any]:
    protocol, execution = preset.protocol, preset.execution
    block = {
        "models": [_MODEL],
        "datasets": [_DATASET],
        "ranks": {"all": [4]},
        "batch_sizes": [4],
        "lrs": {"fullft": [1e-3], "lora": [3e-3]},
        "seeds": 1,
    }
    return {
        "description": "The short sweep of lorabench doctor",
        "datasets": {_DATASET: {"kind": "instruct", "train": 128, "validation": 8, "test": 8, "max_chars": 160}},
        "protocol": {"precision": protocol.precision, "curve_points": 3},
        "experiments": {"rank": [block]},
        "margins": DEFAULT_MARGINS.model_dump(),
        # A checkpoint after each step, so that it does not matter when the job is killed.
        "execution": {
            "threads": execution.threads,
            "gflops": 20.0,
            "checkpoint_minutes": 0.0,
        },
    }


def train(place: Place, processes: int = 1) -> list[dict[str, Any]]:
    """Train the job to its end and return the rows of its runs.

    Raises:
        SweepError: the command failed or took too long, or there is no file of the job.
    """
    with started(
        "lorabench.cli",
        *place.command(processes),
        cwd=place.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        try:
            output, _ = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SweepError(f"the short sweep did not end within {_SECONDS:.0f} s") from error
    if process.returncode:
        lines = output.strip().split("\n")
        raise SweepError(f"the short sweep ended with exit status {process.returncode}: {lines[-1]}")
    return read_rows(place)


def read_rows(place: Place) -> list[dict[str, Any]]:
    """Return the rows of the runs in the file of a finished job."""
    rows: list[dict[str, Any]] = pq.read_table(place.path(place.layout.job(place.job))).to_pylist()
    return rows


def kill(place: Place, processes: int = 1) -> int:
    """Start the job, send SIGTERM to all its processes once there is a checkpoint, and return the exit status.

    Raises:
        SweepError: the job ended before, or does not end.
    """
    with (
        (place.folder / "output.txt").open("w") as output,
        started(
            "lorabench.cli", *place.command(processes), cwd=place.folder, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        if not wait_until(place.checkpoints, process, _SECONDS):
            lines = (place.folder / "output.txt").read_text().strip().split("\n")
            raise SweepError(f"the short sweep wrote no checkpoint before its end; its last line: {lines[-1]}")
        for pid in family(process.pid):
            send(pid, signal.SIGTERM)
        try:
            return process.wait(_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SweepError(f"the short sweep did not end within {_SECONDS:.0f} s of SIGTERM") from error


def judge_sweep(rows: Sequence[Row], seconds: float) -> Check:
    """Judge the runs of a finished short sweep."""
    losses = [(_base_loss(row), row["final_valid_nll"]) for row in rows]
    learned = len(losses) == 2 and all(after is not None and after < before for before, after in losses)
    told = ", ".join(f"{before:.3f} to {after:.3f}" for before, after in losses if after is not None)
    return decided(
        "sweep end to end", learned, f"{len(rows)} runs took {seconds:.0f} s; validation losses went from {told}"
    )


def _base_loss(row: Row) -> float:
    return float(
        next(p["value"] for p in row["curve"] if (p["step"], p["split"], p["metric"]) == (0, "validation", "nll"))
    )


def check_resume(fresh: Place, unbroken: Sequence[Row]) -> Check:
    """Kill the short sweep by SIGTERM, resume it, and compare every loss with those of the unbroken one."""
    _need(unbroken)
    place = fresh.copy("killed")
    status = kill(place)
    if not place.checkpoints() or status != 128 + signal.SIGTERM:
        return decided("resume", False, f"after SIGTERM the job ended with status {status} and left no checkpoint")
    return judge_resume(train(place), unbroken)


def judge_resume(rows: Sequence[Row], unbroken: Sequence[Row]) -> Check:
    """Judge the runs of a sweep that was killed and resumed against those of one that was not."""
    difference = largest_difference(rows, unbroken)
    sentence = "the losses of a sweep that was killed by SIGTERM and resumed are those of one that was not" + (
        f", but for {difference:.1e}" if difference else ", bit for bit"
    )
    return at_most("resume", difference, 0.0, "relative difference", sentence)


def check_processes(fresh: Place, alone: Sequence[Row], processes: int, precision: str) -> Check:
    """Train the short sweep by several processes and compare its losses with those of one process."""
    _need(alone)
    spread = largest_difference(train(fresh.copy("several"), processes), alone)
    sentence = f"{processes} processes trained the short sweep; its losses differ by {spread:.1e} from those of one"
    return at_most("several processes", spread, LOSS_SPREAD[precision], "relative difference", sentence)


def check_processes_stop(fresh: Place, processes: int) -> Check:
    """Send SIGTERM to all processes of the short sweep; they must leave a checkpoint that can be read."""
    place = fresh.copy("stopped")
    status = kill(place, processes)
    steps = [json.loads(read_header(path)["progress"])["step"] for path in place.checkpoints()]
    left = f"left a checkpoint of step {max(steps)}" if steps else "left no checkpoint"
    return decided(
        "SIGTERM to all processes",
        bool(steps) and status == 128 + signal.SIGTERM,
        f"{processes} processes got SIGTERM; the job ended with status {status} and {left}",
    )


def _need(rows: Sequence[Row]) -> None:
    if not rows:
        raise SweepError("the short sweep did not end without an interruption, so there is nothing to compare with")


def largest_difference(rows: Sequence[Row], others: Sequence[Row]) -> float:
    """Return the largest relative difference of the losses in the curves and results of two sets of the same runs.

    It is infinite where one has a number that the other lacks.
    """
    one, other = _losses(rows), _losses(others)
    if one.keys() != other.keys():
        return float("inf")
    return max((abs(one[key] - other[key]) / max(abs(other[key]), 1e-12) for key in one), default=float("inf"))


def _losses(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    numbers: dict[tuple[Any, ...], float] = {}
    for row in rows:
        for name in ("final_valid_nll", "final_test_nll"):
            if row[name] is not None:
                numbers[row["run_id"], name] = row[name]
        for point in row["curve"]:
            if point["metric"] == "nll" and point["value"] is not None:
                numbers[row["run_id"], point["step"], point["split"]] = point["value"]
    return numbers
