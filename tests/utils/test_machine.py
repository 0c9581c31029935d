"""The machine as jobs meet it: names of GPUs, limits of time, and memory that a process keeps."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest

from lorabench.utils.exhaustion import keep_freed_memory
from lorabench.utils.gpus import GB, GPUS, difference_from, is_called
from lorabench.utils.slurm import minutes_of, partition_minutes


@pytest.mark.parametrize(
    ("gpu", "device", "same"),
    [
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("RTX-4090", "NVIDIA GeForce RTX 4090", True),
    ],
)
def test_gpus_are_known_by_what_they_call_themselves(gpu, device, same):
    assert gpu in GPUS
    assert is_called(gpu, device) == same


def test_another_gpu_or_a_part_of_one_is_told():
    # A whole H100 reports 85.0 of its 80 x 1.0737 GB; a half of it (MIG) has the same name.
    assert difference_from("H100-80GB", "NVIDIA H100 80GB HBM3", 85.0 * GB) is None
    assert difference_from("H100-80GB", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", 42 * GB) == (
        "this is an NVIDIA H100 80GB HBM3 MIG 3g.40gb of 42 GB, but execution.gpu is H100-80GB of 80 GB: "
        "the plan's times do not hold, and its memory may not fit"
    )
    assert "NVIDIA L40S of 48 GB" in difference_from("A100-40GB", "NVIDIA L40S", 48 * GB)


def test_every_form_of_a_limit():
    limits = {"infinite": math.inf, "2-00:00:00": 2880, "12:30:00": 750, "30:00": 30}
    assert [minutes_of(limit) for limit in limits] == list(limits.values())
    assert minutes_of("n/a") is None


def test_the_limit_of_a_partition(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert partition_minutes("") is None, "without Slurm"
    sinfo = tmp_path / "sinfo"
    sinfo.write_text("#!/bin/sh\necho 'cpu*|1:00:00'; echo 'gpu|1-00:00:00'; echo 'long|infinite'\n")
    sinfo.chmod(0o755)
    assert [partition_minutes(names) for names in ("", "gpu", "long", "gpu,long")] == [60, 1440, math.inf, 1440]
    assert partition_minutes("gpu,elsewhere") is None


# Counts page faults of a loop that, as a training step does, holds many blocks at once (8 MiB) and frees them together.
FAULTS = """
import resource, sys
import numpy as np
from lorabench.utils.exhaustion import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
def step():
    return [np.ones(1 << 15) for _ in range(32)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc"
)
def test_freed_blocks_are_used_again_without_new_pages():
    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", FAULTS, *arguments]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # 2,048 pages in each of 20 steps.
    assert faults() > 20_000
    assert faults("keep") < 4_000


@pytest.mark.parametrize(("platform", "names"), [("darwin", ("mallopt",)), ("linux", ("mallopt",))])
def test_nothing_happens_without_glibc(monkeypatch, platform, names):
    library = type("Library", (), {name: lambda *_: pytest.fail("mallopt was called") for name in names})()
    monkeypatch.setattr("lorabench.utils.exhaustion.sys.platform", platform)
    monkeypatch.setattr("lorabench.utils.exhaustion.ctypes.CDLL", lambda name: library)
    assert keep_freed_memory() is False
