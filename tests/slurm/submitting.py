"""The workflow on a Slurm of the tests: a clone with an adapted profile, the command, and what was submitted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabench.runs import Job

from ..workflow.checkout import adapt_profile, fresh_clone
from .cluster import Cluster


def adapted_clone(folder: Path, *presets: Path) -> Path:
    """Make a clone with some presets, whose profile looks at the state of jobs early."""
    fresh_clone(folder)
    for preset in presets:
        shutil.copy(preset, folder)
    adapt_profile(folder, "status-checks: 40", "status-checks: 2")
    return folder


@contextmanager
def workflow(
    cluster: Cluster, checkout: Path, *arguments: str, preset: str = "cluster.yaml"
) -> Iterator[Callable[[], str]]:
    """Run the README's command in the background; yield a function that returns its output, empty until its end."""
    log = checkout / "snakemake.out"
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--profile", "slurm", *arguments]
    command += ["--config", f"preset={preset}"]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=checkout, env=cluster.environment, stdout=out, stderr=out)

    def output() -> str:
        if process.poll() is None:
            return ""
        assert process.returncode == 0, log.read_text()
        return log.read_text()

    try:
        yield output
    finally:
        process.kill()
        process.wait()


def saved_step(checkpoint: Path) -> int:
    """Return the step in the header of a checkpoint, which may be replaced at any time."""
    with checkpoint.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["progress"])["step"]


def of_job(jobs: list[dict[str, str]], job: Job) -> list[dict[str, str]]:
    """Return the tries of a training job, in the order of their submission."""
    return [submitted for submitted in jobs if submitted["Comment"] == f"rule_train_wildcards_{job.job_id}"]


def of_rule(jobs: list[dict[str, str]], rule: str) -> list[dict[str, str]]:
    """Return the jobs of a rule."""
    return [job for job in jobs if re.match(rf"rule_{rule}(_wildcards|$)", job["Comment"])]
