"""What is chosen to be computed, and that each check can fail."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lorabench.config.loading import load_preset
from lorabench.doctor import bench
from lorabench.doctor.bench import training_subjects
from lorabench.doctor.record import Record
from lorabench.models import lora
from lorabench.models.specs import dimensions
from lorabench.planning.memory import USABLE, title
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training.run import Machine
from lorabench.utils.gpus import GPUS

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


def test_memory_fails_where_the_plan_is_wrong(smoke):
    subject = training_subjects(smoke)[1]
    peak, seconds = bench.measure_step(smoke.preset, CPU, subject)
    assert 0 < seconds < 10
    checks = [bench.check_memory(smoke.preset, CPU, subject, peak / wrong) for wrong in (1.0, 0.5, 2.0)]
    assert [check.status for check in checks] == ["pass", "fail", "fail"]


@pytest.mark.slow
def test_the_whole_command_on_a_small_preset_passes_within_two_minutes(tmp_path):
    command = [sys.executable, "-m", "lorabench.cli", "doctor", "--preset", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (tmp_path / "results/doctor").iterdir()
    record = Record.model_validate_json(path.read_bytes())
    assert {check.status for check in record.checks} == {"pass", "measured"}
    assert record.gflops is not None
