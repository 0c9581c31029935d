"""Jobs that run at once on one machine hold different GPUs; the GPUs are names that a stand-in of nvidia-smi lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.errors import UserError
from lorabench.utils.gpus import own_devices, visible_devices

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
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with three GPUs, and the working directory of its jobs."""
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        # Set first, so that the test's own assignments are undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_two_jobs_hold_a_device_at_once(machine):
    jobs = [subprocess.Popen([sys.executable, "-c", JOB, count]) for count in "1211213"]
    assert [job.wait(60) for job in jobs] == [0] * len(jobs)
    held: set[str] = set()
    sizes = []
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


def test_the_devices_that_slurm_assigned_stay(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with own_devices(1, print), own_devices(1, print):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_where_there_is_no_device_only_a_setting_of_the_allocator_is_made_unless_the_user_made_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with own_devices(1, print), own_devices(1, print):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    with own_devices(1, print):
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
