"""`lorabench step train --processes 2`, as the workflow calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import REPOSITORY
from .conftest import children, command, sweep_of, trained, wait_for

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


WORKER = """
import os, time
from pathlib import Path
from lorabench.utils import signals

with signals.stop_after_step():
    Path("started." + os.environ["RANK"]).touch()
    while not signals.requested():
        time.sleep(0.01)
    time.sleep(1.5)
    Path("saved." + os.environ["RANK"]).touch()
"""
LAUNCHER = """
from lorabench.cli.common import in_one_sentence
from lorabench.training.distributed import launch

with in_one_sentence():
    launch(2, ["worker.py"])
"""


def launcher_in(folder: Path) -> subprocess.Popen:
    """Start two processes of `worker.py` in a folder."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", LAUNCHER], cwd=folder, env=environment, stderr=subprocess.PIPE)


def test_the_launcher_waits_until_its_processes_have_saved_however_many_signals_come(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = launcher_in(tmp_path)
    for rank in (0, 1):
        wait_for(tmp_path / f"started.{rank}", lambda: launcher.poll() is None)
    # Slurm signals every process of a job, and does so again; the launcher passes the signal on as well.
    for _ in range(4):
        for pid in (*children(launcher.pid), launcher.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    launcher.wait(timeout=60)
    saved = sorted(path.name for path in tmp_path.glob("saved.*"))
    said = launcher.communicate()[1].decode()
    assert saved == ["saved.0", "saved.1"]
    assert said.count("lorabench: stopped by SIGTERM") == 1


STEP = """
import json
from dataclasses import replace
from pathlib import Path
import torch
from lorabench.config.inputs import TinyModel
from lorabench.models.base import load_model, skeleton
from lorabench.training.distributed import errors_to_launcher, join, leave
from lorabench.training.loss import Batch, add_gradient
from lorabench.training.run import Machine, clip_gradient, deterministically

class Put(torch.autograd.Function):
    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.zeros_like(gradient).put_(torch.arange(gradient.numel()).view_as(gradient), gradient)

processes = join()
spec = TinyModel(kind="tiny", name="llama-64")
model = processes.shard(load_model(spec) if processes.first else skeleton(spec))
model.model.layers[0].register_forward_hook(lambda module, inputs, output: Put.apply(output))
batch = Batch(*torch.randint(model.config.vocab_size, (2, 2, 8)))
# The CPU has operations with and without deterministic kernels too.
machine = replace(Machine(torch.device("cuda"), 16), processes=processes)
parameters, norms = list(model.parameters()), []
with errors_to_launcher():
    for _ in range(2):
        deterministically(lambda: add_gradient(model, batch, 32, None, None), model.zero_grad, machine)
        norms.append(clip_gradient(parameters, None))
        model.zero_grad()
if processes.first:
    Path("norms.json").write_text(json.dumps(norms))
leave(processes)
"""


def test_processes_start_again_without_deterministic_kernels_where_an_operation_has_none(tmp_path):
    """The pass that is broken off would leave a sharded model without any gradient."""
    (tmp_path / "worker.py").write_text(STEP)
    launcher = launcher_in(tmp_path)
    said = launcher.communicate(timeout=240)[1].decode()
    assert launcher.returncode == 0, said
    assert said.count("the processes start again with LORABENCH_NONDETERMINISTIC=1: put_ has no deterministic") == 1
    norms = json.loads((tmp_path / "norms.json").read_text())
    assert norms[0] > 0
    assert norms[0] == norms[1]


def test_processes_that_get_a_signal_save_together(ready, caplog):
    plan, layout = ready("stopped", {"checkpoint_minutes": 1000, "keep_weights": "all"})
    sweep = sweep_of(plan, "lora")
    process = subprocess.Popen(command(sweep.sweep_id, "--processes", "2"), stderr=subprocess.PIPE, text=True)
    run = sweep.grid()[0]
    wait_for(layout.progress(run), lambda: process.poll() is None)
    # As Slurm does, to all processes and several times.
    for _ in range(4):
        for pid in (*children(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    errors = [line for line in said.splitlines() if line.startswith("lorabench:")]
    assert errors == ["lorabench: stopped by SIGTERM; what was done is kept, the same command goes on from there"]
    assert "Traceback" not in said
    assert len(list(layout.runs.glob("*.partial/checkpoint.*1-of-2.safetensors"))) == 1
    assert not layout.lock(run).exists()
    # test_distributed.py goes on in several processes.
    with caplog.at_level("INFO"):
        trained(plan, layout, "lora")
    assert caplog.text.count("goes on after step") == 1
