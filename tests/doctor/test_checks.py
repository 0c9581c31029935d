"""Verdicts from numbers, what is chosen to be computed, and that each check can fail."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from lorabench.config.loading import load_preset
from lorabench.doctor import machine, parity, short_sweep, steps, verdict
from lorabench.doctor.bench import Step
from lorabench.doctor.run import _Checks
from lorabench.doctor.subject import (
    CPU_HIDDEN,
    drawing_subject,
    narrowed,
    on_this_device,
    planned_memory,
    training_subjects,
)
from lorabench.errors import UserError
from lorabench.models import lora_products
from lorabench.models.dimensions import dimensions
from lorabench.planning.memory import USABLE
from lorabench.planning.plan import make_plan
from lorabench.training.rl.sampler import sample
from lorabench.utils.gpus import GB, GPUS

from .conftest import bench_of

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("gpu", "device", "memory", "status"),
    [
        ("H100-80GB", H100, 85.0e9, "pass"),
        ("H100-80GB", H100, 40.0e9, "fail"),
        ("H200", H100, 85.0e9, "fail"),
        ("H200", "a processor", None, "fail"),
        (None, "a processor", None, "pass"),
    ],
)
def test_the_device_must_be_the_one_that_the_preset_names(gpu, device, memory, status):
    check = machine.check_device(gpu, device, memory)
    assert check.status == status
    assert device in check.sentence


def test_verdicts_are_those_of_the_limits():
    assert [verdict.at_most("", value, 1.0, "", "").status for value in (0.5, 1.0, 1.1)] == ["pass", "pass", "fail"]
    assert [verdict.at_least("", value, 1.0, "", "").status for value in (0.9, 1.0, 2.0)] == ["fail", "pass", "pass"]
    ratios = [verdict.near("", value, 100.0, 0.1, "", "").status for value in (89, 91, 109, 111)]
    assert ratios == ["fail", "pass", "pass", "fail"]
    for value in (float("nan"), float("inf")):
        for check in (verdict.at_most("", value, 1, "", ""), verdict.at_least("", value, 1, "", "")):
            assert (check.status, check.value) == ("fail", None)
        assert verdict.measured("", value, "", "").status == "fail"


def test_an_error_is_a_failed_check_in_one_sentence_and_the_others_go_on():
    checks = _Checks(lambda check: None)

    def broken():
        raise RuntimeError("CUDA error: no kernel image\nmore lines")

    def refused():
        raise UserError("model folder x has no config.json")

    checks.make("a", broken)
    checks.make("b", refused)
    checks.make("c", lambda: verdict.skipped("c", "why"))
    assert [(check.name, check.status) for check in checks.done] == [("a", "fail"), ("b", "fail"), ("c", "skipped")]
    assert checks.done[0].sentence == "the check raised RuntimeError: CUDA error: no kernel image"
    assert checks.done[1].sentence == "model folder x has no config.json"


def test_the_largest_models_that_fit_one_gpu_are_chosen():
    core, paper = (make_plan(load_preset(name)) for name in ("core", "paper"))
    titles = [subject.title for subject in training_subjects(core, core.preset)]
    assert titles[0].startswith("FullFT, llama-3-2-")
    assert [title.split(",")[0] for title in titles[1:]] == ["LoRA r1 all", "LoRA r512 all"]
    subjects = training_subjects(paper, paper.preset)
    assert "qwen3-30b-a3b" in subjects[-1].title
    # The mixture of experts fits no single GPU, so it has fewer layers of the same sizes.
    whole = dimensions(paper.preset.models["qwen3-30b-a3b-base"])
    assert replace(subjects[-1].sizes, layers=whole.layers) == whole
    assert 1 <= subjects[-1].sizes.layers < whole.layers
    limit = USABLE * GPUS["H200"].memory
    assert all(subject.wide and planned_memory(paper.preset, subject) <= limit for subject in subjects)


def test_a_cpu_computes_the_same_architectures_small():
    paper = make_plan(load_preset("paper"))
    small = training_subjects(paper, on_this_device(paper.preset, on_gpu=False))
    assert all(not subject.wide and subject.sizes.hidden == CPU_HIDDEN for subject in small)
    for name in paper.preset.models:
        sizes = dimensions(paper.preset.models[name])
        cut = narrowed(sizes)
        assert (cut.query_key_norms, cut.tied, bool(cut.experts)) == (
            sizes.query_key_norms,
            sizes.tied,
            bool(sizes.experts),
        )
        assert cut.heads % cut.kv_heads == 0
        assert (cut.heads > cut.kv_heads) == (sizes.heads > sizes.kv_heads)
        assert cut.parameters < 10e6
    # The tiny bases are computed as they are, so that their speed is that of the preset.
    smoke = make_plan(load_preset("smoke"))
    subjects = training_subjects(smoke, smoke.preset)
    assert [subject.wide for subject in subjects] == [True] * 3
    assert [subject.condition.rank for subject in subjects] == [None, 1, 16]
    assert drawing_subject(smoke, smoke.preset) is not None


def test_parity_fails_where_lora_is_computed_wrongly(smoke, monkeypatch):
    subject = training_subjects(smoke.plan, smoke.preset)[1]
    assert parity.check_parity(smoke, subject, "fp32").status == "pass"
    narrow = lora_products._narrow
    monkeypatch.setattr(lora_products, "_narrow", lambda x, factor: narrow(x, factor).mul_(1.01))
    broken = parity.check_parity(smoke, subject, "fp32")
    assert broken.status == "fail"
    assert broken.value > 1e-3


def test_parity_of_experts_fails_where_they_are_computed_wrongly(tmp_path, monkeypatch):
    bench = bench_of("laptop_more", tmp_path)
    subject = next(s for s in training_subjects(bench.plan, bench.preset) if s.sizes.experts)
    for precision in ("fp32", "bf16"):
        assert parity.check_parity(bench, subject, precision).status == "pass"
    build = parity.random_model

    def build_and_spoil(sizes, device, plain=False):
        model = build(sizes, device, plain)
        experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
        assert experts
        for module in [] if plain else experts:
            right = module.forward
            module.forward = lambda *inputs, right=right: 1.01 * right(*inputs)
        return model

    monkeypatch.setattr(parity, "random_model", build_and_spoil)
    broken = parity.check_parity(bench, subject, "fp32")
    assert broken.status == "fail"
    assert broken.value > 1e-3


def test_the_sampler_fails_where_its_log_probabilities_are_wrong(smoke):
    subject = drawing_subject(smoke.plan, smoke.preset)
    assert parity.check_sampler(smoke, subject).status == "pass"

    def warm(*arguments):
        return [replace(response, logprobs=response.logprobs * np.float32(1.001)) for response in sample(*arguments)]

    assert parity.check_sampler(smoke, subject, warm).status == "fail"


def test_a_step_that_does_not_repeat_fails(smoke):
    subject = training_subjects(smoke.plan, smoke.preset)[0]
    step = Step(smoke, subject)
    assert steps.check_repeats(step, subject).status == "pass"
    gradient = step.gradient

    def drifting():
        loss = gradient()
        with torch.no_grad():
            next(iter(step.parameters.values())).mul_(1 + 1e-6)
        return loss

    step.gradient = drifting
    broken = steps.check_repeats(step, subject)
    assert broken.status == "fail"
    assert broken.value > 0


def test_memory_fails_where_the_plan_is_wrong(smoke):
    subject = training_subjects(smoke.plan, smoke.preset)[1]
    right = steps.check_memory(smoke, subject)
    assert right.status == "pass"
    for wrong in (0.5, 2.0):
        assert steps.check_memory(smoke, subject, wrong * right.planned * GB).status == "fail"


def test_speed_has_a_limit_for_large_models_on_a_gpu_only(smoke):
    subject = training_subjects(smoke.plan, smoke.preset)[0]
    large = replace(subject, sizes=replace(subject.sizes, layers=10_000))
    on_gpu = replace(smoke, machine=replace(smoke.machine, device=torch.device("cuda")))
    speeds = [steps.Speed(share * 1e12, 1.0) for share in (0.5, 0.7)]
    assert [steps.check_speed(on_gpu, large, speed, 1e12).status for speed in speeds] == ["fail", "pass"]
    assert steps.check_speed(on_gpu, subject, speeds[0], 1e12).status == "measured"
    assert steps.check_speed(smoke, large, speeds[0], 1e12).status == "measured"


def test_files_and_locks_of_two_processes(tmp_path):
    files, locks = machine.check_files_and_locks(tmp_path)
    assert (files.status, locks.status) == ("pass", "pass")
    # A file system that excludes nobody.
    _, broken = machine.check_files_and_locks(tmp_path, lambda *arguments: nullcontext())
    assert broken.status == "fail"


def test_the_time_limit_is_the_shortest_that_is_known(smoke, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.setattr(machine, "partition_minutes", lambda partition: math.inf)
    profile = tmp_path / "config.yaml"
    assert machine.check_time_limit(smoke.plan, profile).status == "skipped"
    profile.write_text("default-resources:\n  max_runtime: 90\n")
    assert machine.check_time_limit(smoke.plan, profile, now=0.0).value == 90
    monkeypatch.setattr(machine, "partition_minutes", lambda partition: 60.0)
    assert machine.check_time_limit(smoke.plan, profile, now=0.0).value == 60
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1800")
    assert machine.check_time_limit(smoke.plan, profile, now=0.0).value == 30


def rows(*losses, final=1.5):
    curve = [{"step": step, "split": "train", "metric": "nll", "value": loss} for step, loss in enumerate(losses, 1)]
    base = {"step": 0, "split": "validation", "metric": "nll", "value": 2.0}
    return [{"run_id": name, "curve": [base, *curve], "final_valid_nll": final, "final_test_nll": 1.6} for name in "ab"]


def test_runs_are_the_same_only_if_every_loss_is():
    assert short_sweep.judge_resume(rows(2.0, 1.8), rows(2.0, 1.8)).status == "pass"
    other = short_sweep.judge_resume(rows(2.0, 1.8), rows(2.0, 1.8000001))
    assert other.status == "fail"
    assert other.value == pytest.approx(5.6e-8, rel=0.1)
    assert short_sweep.judge_resume(rows(2.0), rows(2.0, 1.8)).status == "fail"
    assert short_sweep.judge_resume([], []).status == "fail"
    assert short_sweep.judge_sweep(rows(2.0), 1.0).status == "pass"
    assert short_sweep.judge_sweep(rows(2.0, final=2.1), 1.0).status == "fail"
    assert short_sweep.judge_sweep(rows(2.0, final=None), 1.0).status == "fail"


@pytest.mark.slow
def test_the_whole_command_on_a_small_preset_passes_within_four_minutes(tmp_path):
    command = [sys.executable, "-m", "lorabench.cli", "doctor", "--preset", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (tmp_path / "results/doctor").iterdir()
    from lorabench.doctor.record import read_record

    found = read_record(path)
    assert {check.status for check in found.checks} == {"pass", "measured", "skipped"}
    skipped = [check.name for check in found.checks if check.status == "skipped"]
    assert skipped == ["models of the hub", "vLLM", "time limit", "several processes", "SIGTERM to all processes"]
    assert found.gflops > 0
    for check in found.checks:
        assert check.name in done.stderr
