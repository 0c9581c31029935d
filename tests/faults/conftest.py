"""Real jobs, each in a process that is forked from one that has imported torch, so that it starts at once.

Tests that run jobs are marked slow.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from lorabench import runs
from lorabench.planning.plan import Plan, make_plan
from lorabench.store.layout import Layout

from ..conftest import MARGINS
from ..forks import FORKS, redirect_output

BLOCK: dict[str, Any] = {"models": ["tiny"], "ranks": {"all": [2]}, "lrs": {"fullft": [], "lora": [1e-3, 3e-3]}}
SIZES = {"train": 32, "validation": 8, "test": 8}
PRESET: dict[str, Any] = {
    "description": "faults",
    "models": {"tiny": {"kind": "tiny"}},
    "datasets": {"instruct": SIZES | {"kind": "instruct", "max_chars": 200}},
    "problems": {"gcd": SIZES | {"kind": "arithmetic", "tasks": ["gcd"], "max_value": 50}},
    "experiments": {
        "rank": [BLOCK | {"datasets": ["instruct"], "batch_sizes": [16], "epochs": 4.0, "seeds": 2}],
        "rl_arithmetic": [
            BLOCK
            | {"problems": ["gcd"], "problems_per_step": 4, "group_size": 4, "steps": 8, "evaluations": 2}
            | {"max_new_tokens": 4, "mean_response_tokens": 2}
        ],
    },
    "margins": MARGINS,
    "execution": {"gflops": 20.0, "max_batch_tokens": 160, "checkpoint_minutes": 0.0},
}

# The number of the grid's run that is in progress when a job is killed, by task.
AT_WORK = {"sft": 1, "rl": 1}


@dataclass(frozen=True)
class Place:
    """A working directory with the preset `mine.yaml` in it."""

    folder: Path

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(str(self.folder / "mine.yaml"))

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.layout.preset)

    def sweep(self, task: str) -> runs.Sweep:
        return next(sweep for sweep in self.plan.sweeps if sweep.condition.task == task)

    def job(self, task: str) -> runs.Job:
        return self.plan.job_of[self.sweep(task)]

    def path(self, path: Path) -> Path:
        return self.folder / path

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        raw = yaml.safe_load((self.folder / "mine.yaml").read_text())
        change(raw)
        (self.folder / "mine.yaml").write_text(yaml.safe_dump(raw))
        self.__dict__.pop("layout", None)
        self.__dict__.pop("plan", None)

    def copy(self, folder: Path) -> "Place":
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Place(folder)

    def run_path(self, task: str, number: int, *parts: str) -> Path:
        run_id = self.sweep(task).grid()[number].run_id
        return self.path(self.layout.runs).joinpath(run_id, *parts)

    def checkpoint(self, task: str, number: int) -> Path:
        final = self.run_path(task, number)
        return final.with_name(f"{final.name}.partial") / "checkpoint.safetensors"

    def start(self, *arguments: str, file_size: int | None = None) -> "JobProcess":
        """Start a command of lorabench, which may write no file of more than `file_size` bytes."""
        with_preset = [*arguments, "--preset", "mine.yaml"]
        output = self.folder.with_name(f"{self.folder.name}.output-{time.monotonic_ns()}")
        process = FORKS.Process(target=_command, args=(with_preset, self.folder, output, file_size))
        process.start()
        return JobProcess(process, output)

    def run(self, *arguments: str, status: int = 0, **limits: int) -> str:
        job = self.start(*arguments, **limits)
        assert job.wait() == status, job.text
        return job.text

    def train(self, task: str, status: int = 0, **limits: int) -> str:
        return self.run("step", "train", self.job(task).job_id, status=status, **limits)

    def numbers(self, task: str) -> list[dict[str, Any]]:
        """Return the results that must not depend on what happened to a job."""
        names = ["run_id", "status", "final_valid_nll", "final_test_nll", "final_reward", "best_reward", "train_tokens"]
        return pq.read_table(self.path(self.layout.job(self.job(task))), columns=[*names, "curve"]).to_pylist()


@dataclass(frozen=True)
class JobProcess:
    """A running command, and the file of what it prints."""

    process: Any
    output: Path

    @property
    def text(self) -> str:
        return self.output.read_text()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; the process must not end before."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.is_alive(), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.002)

    def wait(self) -> int:
        """Wait for the end and return the exit status, negative for the signal that ended the process."""
        self.process.join(120)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(self.text)
        return self.process.exitcode

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def _command(arguments: list[str], folder: Path, output: Path, file_size: int | None) -> None:
    os.chdir(folder)
    # A shell starts background processes with Ctrl-C ignored, and their children inherit that; a terminal's are not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    redirect_output(output)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    from lorabench.cli.commands import app

    app(arguments)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory) -> Place:
    """The preset with its data and nothing trained; to be copied."""
    place = Place(tmp_path_factory.mktemp("fresh"))
    # As JSON, which is YAML too, so that blocks share nothing.
    (place.folder / "mine.yaml").write_text(json.dumps(PRESET))
    for name in ("instruct", "gcd"):
        # This command restarts itself with fixed hashes, so it cannot be forked.
        command = [sys.executable, "-m", "lorabench.cli", "step", "dataset", name, "--preset", "mine.yaml"]
        subprocess.run(command, cwd=place.folder, check=True)
    place.run("step", "tokens", "tiny", "instruct")
    return place


@pytest.fixture
def place(fresh, tmp_path) -> Place:
    return fresh.copy(tmp_path)


@pytest.fixture(scope="session")
def unbroken(fresh, tmp_path_factory) -> Place:
    """All sweeps, trained without an interruption."""
    place = fresh.copy(tmp_path_factory.mktemp("unbroken"))
    for task in ("sft", "rl"):
        place.train(task)
    return place


@pytest.fixture(scope="session")
def killed(fresh, tmp_path_factory) -> Place:
    """Both sweeps, each killed in the middle of its second run."""
    place = fresh.copy(tmp_path_factory.mktemp("killed"))
    for task, number in AT_WORK.items():
        job = place.start("step", "train", place.job(task).job_id)
        job.until(place.checkpoint(task, number).exists)
        job.signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    return place


@pytest.fixture
def half(killed, tmp_path) -> Place:
    return killed.copy(tmp_path)
