"""Without a scheduler, no more jobs run at once than there are GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.models.base import converted_folder
from lorabench.planning.plan import make_plan
from lorabench.storage.layout import Layout

from .checkout import fresh_clone

pytestmark = pytest.mark.slow

# A command in place of lorabench, which says when a job starts and ends.
COMMAND = """#!/bin/bash
echo start >>log
sleep 0.5
echo end >>log
mkdir -p results/smollm2/jobs && touch results/smollm2/jobs/$2.parquet
"""


def most_at_once(checkout: Path, *arguments: str) -> int:
    """Run four training jobs of one GPU each, and return the largest number that ran at once."""
    layout = Layout.of("smollm2")
    jobs = [job for job in make_plan(layout.preset).jobs if job.sweeps[0].condition.task == "sft"][:4]
    targets = [str(layout.job(job)) for job in jobs]
    conditions = [job.sweeps[0].condition for job in jobs]
    inputs = [layout.tokens(condition.model, condition.dataset) for condition in conditions]
    inputs += [
        converted_folder(layout.preset.models[condition.model]) / "model.safetensors" for condition in conditions
    ]
    for path in inputs:
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).touch()
    log = checkout / "log"
    log.unlink(missing_ok=True)
    for target in targets:
        (checkout / target).unlink(missing_ok=True)
    command = [sys.executable, "-m", "snakemake", *targets, "--allowed-rules", "train", "--cores", "32", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{checkout}/bin{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [*command, "--config", "preset=smollm2"], cwd=checkout, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    running = most = 0
    for word in log.read_text().split():
        running += 1 if word == "start" else -1
        most = max(most, running)
    assert log.read_text().count("start") == len(jobs)
    return most


def test_jobs_wait_for_a_gpu(tmp_path):
    checkout = fresh_clone(tmp_path)
    (checkout / "bin").mkdir()
    for name, text in (("lorabench", COMMAND), ("nvidia-smi", "#!/bin/sh\nprintf '0\\n1\\n'\n")):
        (checkout / "bin" / name).write_text(text)
        (checkout / "bin" / name).chmod(0o755)
    assert most_at_once(checkout) == 2
    assert most_at_once(checkout, "--resources", "gpu=3") == 3
