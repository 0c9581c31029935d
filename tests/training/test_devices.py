"""What a GPU computes, in tests that run on a CPU as well: long sequences, repetition, and doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml

from lorabench.config.loading import load_preset
from lorabench.doctor import bench
from lorabench.models.passes import trained_parameters
from lorabench.planning.plan import make_plan
from lorabench.training import loss
from lorabench.training.run import Machine, deterministically, machine_of
from lorabench.utils.gpus import GPUS, is_called

from .conftest import needs_gpu


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch) -> torch.device:
    """A device; on a CPU, where the same would take minutes, long sequences and pieces of logits are shorter."""
    if request.param == "cpu":
        monkeypatch.setattr(bench, "LONG", 512)
        monkeypatch.setitem(loss.MAX_LOGITS, "cpu", 1 << 19)
    return torch.device(request.param)


@pytest.fixture(scope="module")
def plan():
    return make_plan(load_preset("smoke"))


def subject_of(plan, arm: int, device: torch.device) -> bench.Subject:
    """Return the subject of FullFT (0) or LoRA (1), with a vocabulary whose logits are computed in two pieces."""
    subject, pieces = bench.training_subjects(plan)[arm], 2
    vocabulary = pieces * loss.MAX_LOGITS[device.type] // bench.LONG
    return replace(subject, sizes=replace(subject.sizes, vocabulary=vocabulary))


@pytest.mark.parametrize(("arm", "precision"), [(0, "fp32"), (1, "bf16")])
def test_a_long_sequence_has_the_loss_and_gradient_of_plain_code(device, plan, arm, precision):
    machine, subject = Machine(device, bench.LONG), subject_of(plan, arm, device)
    check = bench.check_parity(plan.preset, machine, subject, precision, long=True)
    assert check.status == "pass", check.sentence


@pytest.mark.parametrize("arm", [0, 1])
def test_a_gradient_comes_out_again_bit_for_bit(device, plan, arm):
    subject = subject_of(plan, arm, device)
    model = bench.random_model(subject.sizes, subject.condition, plan.preset, device)
    split = bench.random_split(2, bench.LONG, subject.sizes.vocabulary)
    machine = Machine(device, 2 * bench.LONG, autocast=torch.bfloat16)
    gradients = []
    for _ in range(2):
        compute = partial(loss.batch_gradient, model, split, np.arange(2), machine)
        nll = deterministically(compute, model.zero_grad, machine)[0]
        gradients.append([nll, *(parameter.grad.clone() for parameter in trained_parameters(model).values())])
        model.zero_grad()
    assert gradients[0][0] == gradients[1][0]
    assert all(map(torch.equal, gradients[0][1:], gradients[1][1:]))


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


def test_products_in_bf16_are_summed_in_fp32(device, plan):
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    machine = machine_of(plan)
    assert matmul.allow_bf16_reduced_precision_reduction == (machine.device.type == "cpu")
