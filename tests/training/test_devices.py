"""`lorabench doctor` on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml

from lorabench.utils.gpus import GPUS, is_called


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
