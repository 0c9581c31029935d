"""The machine as jobs meet it: its GPUs, which jobs that run at once share, and limits of time."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.errors import UserError
from lorabench.utils.gpus import own_devices, visible_devices
from lorabench.utils.slurm import partition_minutes

# Each line is written at once: a job says which devices it takes and that it gives them back.
JOB = """
import os, sys, time
from lorabench.utils.gpus import own_devices
with own_devices(int(sys.argv[1]), lambda line: None), open("log", "a") as log:
    for word in ("takes", "leaves"):
        print(word, os.environ["CUDA_VISIBLE_DEVICES"], file=log, flush=True)
        time.sleep(0.1)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that writes a shell script, which is then found before all other programs."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def write(name: str, commands: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{commands}\n")
        (tmp_path / name).chmod(0o755)

    return write


@pytest.fixture
def machine(tmp_path, monkeypatch, program) -> Path:
    """A machine whose nvidia-smi lists three GPUs, and the working directory of its jobs."""
    program("nvidia-smi", "printf '0\\n1\\n2\\n'")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        # Set first, so that the test's own assignments are undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_two_jobs_hold_a_device_at_once(machine):
    jobs = [subprocess.Popen([sys.executable, "-c", JOB, count]) for count in "1211213"]
    assert [job.wait(60) for job in jobs] == [0] * len(jobs)
    held, sizes = set(), []
    for line in (machine / "log").read_text().splitlines():
        word, names = line.split()
        devices = set(names.split(","))
        if word == "takes":
            assert not held & devices, line
            held |= devices
        else:
            held -= devices
            sizes.append(len(devices))
    assert not held
    assert sorted(sizes) == [1, 1, 1, 1, 2, 2, 3]


def test_jobs_take_devices_from_those_that_are_visible(machine, monkeypatch):
    assert visible_devices() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a5,2,-1,0")
    assert visible_devices() == ["GPU-a5", "2"]
    with pytest.raises(UserError, match=r"needs 4 GPUs; this machine shows 2 \(GPU-a5, 2\)"):
        own_devices(4, print).__enter__()
    with own_devices(1, print):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a5"


@pytest.mark.parametrize(("visible", "slurm_job"), [("0", "7"), ("", None)])
def test_the_devices_that_slurm_assigned_stay_and_none_is_assigned_where_there_is_none(
    visible, slurm_job, machine, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if slurm_job:
        monkeypatch.setenv("SLURM_JOB_ID", slurm_job)
    with own_devices(1, print), own_devices(1, print):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    # A setting of the user is kept, by its newer name too.
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    with own_devices(1, print):
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_the_limit_of_a_partition(program, monkeypatch):
    limits = {"cpu*": "12:30:00", "gpu": "2-00:00:00", "short": "30:00", "long": "infinite", "odd": "n/a"}
    program("sinfo", "; ".join(f"echo '{name}|{limit}'" for name, limit in limits.items()))
    names = ("", "gpu", "short", "long", "gpu,long")
    assert [partition_minutes(partitions) for partitions in names] == [750, 2880, 30, math.inf, 2880]
    assert partition_minutes("gpu,elsewhere") is None
    assert partition_minutes("gpu,odd") is None
    monkeypatch.setenv("PATH", "")
    assert partition_minutes("") is None, "without Slurm"
