"""What a GPU computes, in tests that run on a CPU as well: long sequences, and doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import yaml

from lorabench.config.loading import load_preset
from lorabench.doctor import bench
from lorabench.planning.plan import make_plan
from lorabench.training import loss
from lorabench.training.run import Machine
from lorabench.utils.gpus import GPUS, is_called

from .conftest import needs_gpu


@pytest.mark.parametrize("kind", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(("arm", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_long_sequence_has_the_loss_and_gradient_of_plain_code(kind, arm, precision, monkeypatch):
    """On a CPU, where the same would take minutes, sequences and pieces of logits are shorter."""
    if kind == "cpu":
        monkeypatch.setattr(bench, "LONG", 512)
        monkeypatch.setitem(loss.MAX_LOGITS, "cpu", 1 << 19)
    plan = make_plan(load_preset("smoke"))
    subject = bench.training_subjects(plan)[arm]
    # The logits of this vocabulary are computed in two pieces.
    sizes = replace(subject.sizes, vocabulary=2 * loss.MAX_LOGITS[kind] // bench.LONG)
    machine = Machine(torch.device(kind), bench.LONG)
    check = bench.check_parity(plan.preset, machine, replace(subject, sizes=sizes), precision, long=True)
    assert check.status == "pass", check.sentence


@pytest.mark.parametrize("name", ["smollm2", "first_gpu"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_doctor_finds_no_fault_of_this_gpu(name, tmp_path):
    gpu = max((gpu for gpu in GPUS if is_called(gpu, torch.cuda.get_device_name())), key=len, default=None)
    if gpu is None or (name == "first_gpu" and find_spec("vllm") is None):
        pytest.skip("this GPU is not in lorabench/utils/gpus.py, or vllm is not installed")
    (tmp_path / "here.yaml").write_text(yaml.safe_dump({"extends": name, "execution": {"gpu": gpu}}))
    command = [sys.executable, "-m", "lorabench.cli", "doctor", "--preset", "here.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
    [record] = (tmp_path / "results/doctor").glob("*.json")
    failed = {check["name"] for check in json.loads(record.read_text())["checks"] if check["status"] == "fail"}
    # What the machine has beside its GPU is not the question here.
    assert failed <= {"memory of the host", "disk"}, done.stderr
