"""The folder and the process of the engine do not outlive the trainer. Needs no vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.rl.engine import PolicyEngine

CHILD = "import sys; from lorabench.training.rl.engine_worker import end_with; end_with(int(sys.argv[1]), sys.argv[2])"
PARENT = (
    "import os, subprocess, sys, time; "
    f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}, str(os.getpid()), sys.argv[1]]); "
    "print(child.pid, flush=True); time.sleep(60)"
)


def test_a_process_ends_when_its_trainer_was_killed(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    time.sleep(2)
    assert folder.is_dir()
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not folder.exists() and (not child.exists() or "Z" in (child / "stat").read_text().split()[2]):
            return
        time.sleep(0.1)
    os.kill(int(child.name), signal.SIGKILL)
    raise AssertionError("the process lives on")


def test_folders_of_killed_jobs_are_removed_and_those_of_others_are_not():
    ended = subprocess.Popen(["true"])
    ended.wait()
    with PolicyEngine(SINGLE_PROCESS) as engine:
        folder = engine._folder
        assert folder.is_dir()
        left, running = (folder.with_name(f"lorabench-policy-{process}-1") for process in (ended.pid, os.getppid()))
        for other in (left, running):
            other.mkdir()
        with PolicyEngine(SINGLE_PROCESS) as another:
            assert another._folder != folder
            assert not left.exists()
            assert running.is_dir()
        running.rmdir()
        assert folder.is_dir()
    assert not folder.exists()
