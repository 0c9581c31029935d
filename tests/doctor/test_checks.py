"""What is chosen to be computed, and that each check can fail."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lorabench.config.loading import load_preset
from lorabench.doctor import bench, gpu_tests
from lorabench.doctor.bench import Subject, training_subjects
from lorabench.doctor.record import Record
from lorabench.errors import UserError
from lorabench.models import lora
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning.memory import USABLE, title
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training import loss
from lorabench.training.run import Machine, machine_of
from lorabench.utils.gpus import GPUS

from ..conftest import REPOSITORY
from ..training.conftest import DEVICES, condition_of

CPU = Machine(torch.device("cpu"), 4096, 1e9)


@pytest.fixture(scope="module")
def smoke():
    return make_plan(load_preset("smoke"))


def test_a_check_that_raises_fails_in_one_sentence_and_the_others_go_on(smoke, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("CUDA error: no kernel image\nmore lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "check_parity", broken)
    monkeypatch.setattr(bench, "measure_step", broken)
    # With all modules of the tests a collection takes half a second.
    monkeypatch.setattr(bench.gc, "collect", lambda: 0)
    record = bench.examine(smoke, Layout.of("smoke"), lambda check: None)
    seen = {(check.name.split(":")[0], check.status, check.sentence) for check in record.checks}
    raised = "the check raised RuntimeError: CUDA error: no kernel image"
    assert seen == {
        ("parity in fp32", "fail", raised),
        ("parity in bf16", "fail", raised),
        ("memory of a step", "fail", raised),
        ("speed of a step", "skipped", "the step failed"),
    }
    assert record.gflops is None


def test_the_largest_models_that_fit_one_gpu_are_chosen():
    core, paper = (make_plan(load_preset(name).with_execution(gpu="H100-80GB")) for name in ("core", "paper"))
    titles = [title(subject.condition) for subject in training_subjects(core)]
    assert [title.split(" of ")[0] for title in titles] == ["full fine-tuning", "LoRA r64 all"]
    subjects = training_subjects(paper)
    assert "qwen3-30b-a3b" in title(subjects[-1].condition)
    # The mixture of experts fits no single GPU, so it has fewer layers of the same sizes.
    whole = dimensions(paper.preset.models["qwen3-30b-a3b-base"])
    assert replace(subjects[-1].sizes, layers=whole.layers) == whole
    assert 1 <= subjects[-1].sizes.layers < whole.layers
    limit = USABLE * GPUS["H100-80GB"].memory
    assert all(subject.planned_memory(paper.preset) <= limit for subject in subjects)


def test_parity_fails_where_lora_is_computed_wrongly(smoke, monkeypatch):
    experts = make_plan(load_preset("laptop_more"))
    mixture = next(subject for subject in training_subjects(experts) if subject.sizes.experts)
    for precision in ("fp32", "bf16"):
        assert bench.check_parity(experts.preset, CPU, mixture, precision).status == "pass"
    dense = training_subjects(smoke)[1]
    assert bench.check_parity(smoke.preset, CPU, dense, "fp32").status == "pass"
    narrow = lora._narrow
    monkeypatch.setattr(lora, "_narrow", lambda x, factor: narrow(x, factor).mul_(1.01))
    for preset, subject in ((smoke.preset, dense), (experts.preset, mixture)):
        broken = bench.check_parity(preset, CPU, subject, "fp32")
        assert broken.status == "fail"
        assert broken.value > 1e-3


# The heads have the sizes of Llama-3.2-1B and of Qwen3, and the vocabulary takes two pieces of logits on a GPU.
LONG_SUBJECTS = {
    "fullft": (None, Dimensions(1024, 2, 16, 4, 64, 4096, 32_768, in_bf16=True)),
    "lora": (16, Dimensions(1024, 2, 16, 8, 128, 3072, 32_768, query_key_norms=True, in_bf16=True)),
}


@pytest.mark.parametrize("method", LONG_SUBJECTS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_gradient_of_a_long_sequence_in_pieces_is_that_of_transformers_and_peft(device, method, smoke, monkeypatch):
    (rank, sizes), machine = LONG_SUBJECTS[method], CPU
    if device == "cuda":
        machine = machine_of(smoke)
        # The reference is computed by the CPU.
        torch.set_num_threads(os.cpu_count())
    else:
        sizes = replace(sizes, hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocabulary=1024)
        monkeypatch.setattr(bench, "LONG", 300)
        monkeypatch.setitem(loss.MAX_LOGITS, "cpu", 128 * 1024)
    subject = Subject(condition_of(method, rank, 1, 1), sizes, 1, 1, 0)
    check = bench.check_parity(smoke.preset, machine, subject, "bf16", long=True)
    assert check.status == "pass", check.sentence
    # The targets of the first piece in each.
    first = loss._nlls
    monkeypatch.setattr(
        loss,
        "_nlls",
        lambda model, targets: lambda logits, piece: first(model, targets[: len(logits)])(logits, slice(None)),
    )
    check = bench.check_parity(smoke.preset, machine, subject, "bf16", long=True)
    assert check.status == "fail", check.sentence


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_memory_fails_where_the_plan_is_wrong(device, number, smoke):
    plan, machine = smoke, CPU
    if device == "cuda":
        plan = make_plan(load_preset("first_gpu"))
        machine = machine_of(plan)
    subject = training_subjects(plan)[number]
    planned = subject.planned_memory(plan.preset)
    if device == "cuda" and planned > USABLE * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip(f"the step takes {planned / 1e9:.0f} GB, more than this GPU has")
    peak, seconds = bench.measure_step(plan.preset, machine, subject)
    assert 0 < seconds < 10
    checks = [bench.check_memory(plan.preset, machine, subject, peak / wrong) for wrong in (1.0, 0.5, 2.0)]
    assert [check.status for check in checks] == ["pass", "fail", "fail"], checks[0].sentence


def test_the_tests_of_a_gpu_are_where_the_doctor_runs_them_or_it_says_what_to_do(tmp_path, monkeypatch):
    marked = [
        path
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        if re.search(r"\b(DEVICES|needs_gpu)\b", path.read_text())
    ]
    assert len(marked) > 2
    folders = [REPOSITORY / folder for folder in gpu_tests.FOLDERS]
    assert all(any(path.is_relative_to(folder) for folder in folders) for path in marked)
    assert gpu_tests.gpu_tests()[-2:] == list(map(str, folders))
    # As installed from a wheel.
    monkeypatch.setattr(gpu_tests, "CLONE", tmp_path)
    with pytest.raises(UserError, match=r"^the tests of a GPU are in the repository: clone it, and run"):
        gpu_tests.gpu_tests()


@pytest.mark.slow
def test_the_whole_command_on_a_small_preset_passes_within_two_minutes(tmp_path):
    command = [sys.executable, "-m", "lorabench.cli", "doctor", "--preset", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (tmp_path / "results/doctor").iterdir()
    record = Record.model_validate_json(path.read_bytes())
    assert {check.status for check in record.checks} == {"pass", "measured"}
    assert record.gflops is not None
