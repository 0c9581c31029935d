"""The bill of a plan: hours, GPUs, memory and money."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lorabench.cli import app
from lorabench.cli.show import plan_json
from lorabench.config.loading import load_preset
from lorabench.doctor.speeds import on_gpu
from lorabench.errors import UserError
from lorabench.planning import bill
from lorabench.planning.plan import make_plan
from lorabench.planning.resources import evaluation_resources
from lorabench.planning.seconds import flops_per_second
from lorabench.utils.gpus import GPUS

from ..handmade.presets import with_model


def test_what_fits_nowhere_is_one_sentence():
    small = load_preset("paper").with_execution(gpu="RTX-4090", max_gpus=2)
    plan = make_plan(with_model(small, models=["llama-3-1-8b-base"]))
    with pytest.raises(
        UserError, match=r"full fine-tuning of llama-3-1-8b-base on \S+ needs \d+ GB on each of 2 x RTX-4090, which"
    ):
        bill.total(plan)


def test_compute_must_fit_one_gpu():
    paper = load_preset("paper")
    compute = paper.experiments.compute.model_copy(update={"models": ["qwen3-14b"]})
    changed = paper.model_copy(update={"experiments": paper.experiments.model_copy(update={"compute": compute})})
    with pytest.raises(UserError, match="experiment compute needs .* for qwen3-14b on one H200"):
        bill.total(make_plan(changed))


def test_an_evaluated_model_must_fit_one_gpu():
    plan = make_plan(load_preset("paper").with_execution(gpu="L40S", sampler="own"))
    job = next(job for job in plan.evaluations() if job.model == "llama-3-1-8b-base")
    with pytest.raises(
        UserError, match="the evaluation needs 56 GB for llama-3-1-8b-base on one L40S, which has 44 GB"
    ):
        evaluation_resources(plan, job)


def test_more_cores_are_faster_until_there_are_no_more_jobs():
    plan = make_plan(load_preset("smoke"))
    assert len(plan.jobs) < 64
    work = bill.training(plan, plan.jobs)
    minutes = [bill.minutes(plan, work, cores) for cores in (1, 2, 64, 128)]
    assert minutes[0] > minutes[1] > minutes[2] == minutes[3]
    # FullFT, two ranks, two placements: 3 LRs and a repeat each; two ranks with two seeds at one LR; RL like the first.
    assert (work.runs, work.jobs, work.gpu_hours) == (5 * 4 + 2 * 2 + 3 * 4, 4, 0)


def test_shared_runs_are_paid_once():
    rows = bill.per_experiment(make_plan(load_preset("core")))
    total = rows.pop("total")
    assert total.runs < sum(row.runs for row in rows.values())
    assert total.gpu_hours < sum(row.gpu_hours for row in rows.values())
    assert total.memory == max(row.memory for row in rows.values())
    assert total.gpus == max(row.gpus for row in rows.values())
    assert total.longest_hours == max(row.longest_hours for row in rows.values())


def test_gpu_hours_are_hours_times_gpus_and_money_is_their_price():
    plan = make_plan(load_preset("paper"))
    rows = json.loads(plan_json(plan, 2, price=2.5))["experiments"]
    for row in rows.values():
        assert row["job_hours"] <= row["gpu_hours"] <= row["gpus"] * row["job_hours"]
        assert row["money"] == pytest.approx(2.5 * row["gpu_hours"])
    assert rows["total"]["memory"] < GPUS[plan.preset.execution.gpu].memory


def test_a_faster_gpu_takes_less_and_a_given_speed_is_believed():
    core = load_preset("core")
    hours = [bill.total(make_plan(on_gpu(core, gpu))).gpu_hours for gpu in ("A100-80GB", "H100-80GB")]
    assert hours[0] > 1.3 * hours[1]
    given = core.with_execution(gflops=50_000.0)
    assert flops_per_second(given.execution) == 50e12
    assert bill.total(make_plan(given)).gpu_hours > hours[1]
    # A speed that was measured on one GPU is not that of another.
    assert on_gpu(given, "H200").execution.gflops is None
    with pytest.raises(UserError, match="gpu 'H1000' is not known; allowed: A100-40GB"):
        on_gpu(core, "H1000")


def test_checkpointing_costs_a_third():
    core = load_preset("core").with_execution(activation_checkpointing=False)
    plain = with_model(core, ranks={"all": [1]}, datasets=["tulu3"])
    again = plain.with_execution(activation_checkpointing=True)
    hours = [bill.total(make_plan(preset)).gpu_hours for preset in (plain, again)]
    assert 1.25 < hours[1] / hours[0] < 1.55


def test_the_plan_is_printed_with_money_and_json():
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", "--preset", "core", "--price", "3", "--gpu", "H200"])
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in ("GPU-hours", "money", "total", "H200"))
    laptop = runner.invoke(app, ["plan"])
    assert "minutes" in laptop.output
    assert "GPU-hours" not in laptop.output
    reply = json.loads(runner.invoke(app, ["plan", "--preset", "paper", "--json"]).output)
    assert reply["experiments"]["total"]["gpu_hours"] > 1000
