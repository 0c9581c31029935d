"""`lorabench step train --processes 2`, as the workflow calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import command, sweep_of, trained, wait_for

pytestmark = pytest.mark.slow


def test_an_error_ends_all_processes_and_is_shown_once(ready):
    plan, layout = ready("broken")
    # Both processes find the error when they read the tokens.
    layout.dataset("instruct").write_bytes(layout.dataset("instruct").read_bytes() + b" ")
    sweep = sweep_of(plan, "lora")
    done = subprocess.run(command(sweep.sweep_id, "--processes", "2"), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("lorabench:")]
    assert len(errors) == 1
    assert "token cache" in errors[0]
    assert "Traceback" not in done.stderr


def test_processes_that_get_a_signal_save_together_and_go_on(ready):
    plan, layout = ready("stopped", {"checkpoint_minutes": 1000, "keep_weights": "all"})
    sweep = sweep_of(plan, "lora")
    process = subprocess.Popen(command(sweep.sweep_id, "--processes", "2"), stderr=subprocess.PIPE, text=True)
    run = sweep.grid()[0]
    wait_for(layout.progress(run), lambda: process.poll() is None)
    # As Slurm does, to all processes and several times; the launcher passes the signal on as well.
    for _ in range(4):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (*map(int, children), process.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    errors = [line for line in said.splitlines() if line.startswith("lorabench:")]
    assert errors == ["lorabench: stopped by SIGTERM; what was done is kept, the same command goes on from there"]
    assert "Traceback" not in said
    assert len(list(layout.runs.glob("*.partial/checkpoint.*1-of-2.safetensors"))) == 1
    assert not layout.lock(run).exists()
    _, lines = trained(plan, layout, "lora", processes=2)
    assert sum("goes on after step" in line for line in lines) == 1
