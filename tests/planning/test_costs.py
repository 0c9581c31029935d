"""What jobs cost and request: never less than the estimate, shared runs once, and computed fast without torch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.cli.show import plan_json
from lorabench.cli.speeds import on_gpu
from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions
from lorabench.planning.costs import (
    compute_cost,
    evaluation_cost,
    job_cost,
    path_hours,
    per_experiment,
    restarts,
)
from lorabench.planning.flops import lora_parameters
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import flops_per_second, is_split, job_seconds, run_job_seconds
from lorabench.runs import Job

from ..handmade import with_model


def total(preset):
    return per_experiment(make_plan(preset))["total"]


def every_job(plan):
    """Return the costs of all jobs of a plan, by the jobs' ids."""
    jobs = {job.job_id: job_cost(plan, job) for job in plan.jobs}
    jobs |= {job.eval_id: evaluation_cost(plan, job) for job in plan.evaluations()}
    if plan.preset.experiments.compute:
        jobs["compute"] = compute_cost(plan)
    return jobs


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_every_job_asks_for_something_sensible(name):
    plan = make_plan(load_preset(name))
    execution = plan.preset.execution
    jobs = every_job(plan)
    for job in jobs.values():
        assert job.gpus in ((0,) if execution.gpu is None else (1, 2, 4, 8))
        assert job.gpus <= execution.max_gpus
        assert job.cpus == execution.threads * max(1, job.gpus)
        assert job.memory > 300e6
        assert job.mem_mb > 300
        assert job.disk >= 1e6
    for job in plan.jobs:
        requested = jobs[job.job_id]
        parts = job.n_runs if plan.is_split(job) else 1
        assert requested.minutes * 60 > job_seconds(plan.preset, job, requested.gpus) / parts
    whole, largest = per_experiment(plan)["total"], max(job.gpus for job in jobs.values())
    assert whole.gpus == largest
    assert (largest > 1) == (name == "paper")


def test_what_fits_nowhere_is_one_sentence():
    paper = load_preset("paper")
    small = paper.with_execution(gpu="RTX-4090", max_gpus=2)
    with pytest.raises(
        UserError, match=r"full fine-tuning of llama-3-1-8b-base on \S+ needs \d+ GB on each of 2 x RTX-4090, which"
    ):
        total(with_model(small, models=["llama-3-1-8b-base"]))
    compute = paper.experiments.compute.model_copy(update={"models": ["qwen3-14b"]})
    changed = paper.model_copy(update={"experiments": paper.experiments.model_copy(update={"compute": compute})})
    with pytest.raises(UserError, match="experiment compute needs .* for qwen3-14b on one H200"):
        total(changed)
    plan = make_plan(paper.with_execution(gpu="L40S", sampler="own"))
    job = next(job for job in plan.evaluations() if job.model == "llama-3-1-8b-base")
    with pytest.raises(
        UserError, match="the evaluation needs 56 GB for llama-3-1-8b-base on one L40S, which has 44 GB"
    ):
        evaluation_cost(plan, job)


def test_runs_as_jobs_start_and_load_the_model_once_each():
    whole = load_preset("paper").with_execution(job_hours=1e6)
    plan, whole_plan = make_plan(load_preset("paper")), make_plan(whole)
    job = next(job for job in plan.jobs if job.sweeps[0].condition.rank == 256)
    [sweep] = job.sweeps
    cost, alone, waves = job_cost(plan, job), job_cost(whole_plan, job), sweep.expected_waves()
    assert (plan.is_split(job), whole_plan.is_split(job)) == (True, False)
    starting = 60 + 4 * dimensions(whole.models[sweep.condition.model]).parameters / 1e9
    assert (cost.job_hours - alone.job_hours) * 3600 == pytest.approx((sweep.n_runs - 1) * starting)
    assert cost.job_hours == cost.gpu_hours == pytest.approx(sweep.n_runs * cost.longest_job_hours)
    # A run's job is given the time of one run, and a whole job that of as many as are possible.
    assert cost.minutes * 60 == pytest.approx(2 * 3600 * cost.longest_job_hours + 600, abs=60)
    assert alone.minutes > sweep.n_runs * cost.minutes
    # Of each run at work there are two checkpoints for a moment, beside the weights of all runs.
    trained = lora_parameters(whole, dimensions(whole.models[sweep.condition.model]), sweep.condition.rank, "all")[0]
    assert cost.working_disk - alone.working_disk == pytest.approx((max(waves) - 1) * 2 * 12 * trained, abs=2e6)
    assert path_hours(plan, job) == pytest.approx(len(waves) * cost.longest_job_hours)


def test_no_number_of_gpus_takes_less_than_the_critical_path():
    plan = make_plan(load_preset("core"))
    rows = json.loads(plan_json(plan, 2))["experiments"]
    paths = {name: row["path_hours"] for name, row in rows.items()}
    assert paths["total"] == max(paths.values()) == max(path_hours(plan, job) for job in plan.jobs)
    assert paths["rl_math"] == max(path_hours(plan, job) for job in plan.jobs_of("rl_math"))
    assert paths["compute"] == rows["compute"]["job_hours"]
    assert paths["total"] < rows["total"]["gpu_hours"]


def test_a_faster_gpu_takes_less_and_a_given_speed_is_believed():
    core = load_preset("core")
    hours = [total(on_gpu(core, gpu)).gpu_hours for gpu in ("A100-80GB", "H100-80GB")]
    assert hours[0] > 1.3 * hours[1]
    given = core.with_execution(gflops=50_000.0)
    assert flops_per_second(given.execution) == 50e12
    assert total(given).gpu_hours > hours[1]
    # A speed that was measured on one GPU is not that of another.
    assert on_gpu(given, "H200").execution.gflops is None
    with pytest.raises(UserError, match="gpu 'H1000' is not known; allowed: A100-40GB"):
        on_gpu(core, "H1000")


def test_the_plan_is_printed_with_money_and_json():
    runner = CliRunner()
    shown = runner.invoke(app, ["plan", "--preset", "core", "--price", "3", "--gpu", "H200"])
    assert shown.exit_code == 0, shown.output
    assert all(
        word in shown.output
        for word in ("GPU-hours", "money", "total", "H200", "critical path", "the longest job takes")
    )
    laptop = runner.invoke(app, ["plan"])
    assert "minutes" in laptop.output
    assert "GPU-hours" not in laptop.output
    reply = json.loads(runner.invoke(app, ["plan", "--preset", "paper", "--json"]).output)
    assert reply["experiments"]["total"]["gpu_hours"] > 1000


def test_weights_of_the_best_runs_stay_on_disk():
    core = load_preset("core")
    plan, everything = make_plan(core), make_plan(core.with_execution(keep_weights="all"))
    full = next(s for s in plan.sweeps if s.condition.method == "fullft" and s.condition.model == "llama-3-2-1b-base")
    best, kept = (job_cost(planned, Job((full,))) for planned in (plan, everything))
    weights = 1235.8144e6
    assert best.disk == pytest.approx(4 * weights * full.seeds.best, abs=1e6)
    # Besides: the weights of the other runs until the best is known, and two checkpoints.
    others = full.most_runs - full.seeds.best
    assert best.working_disk == pytest.approx((4 * others + 2 * 12) * weights, abs=2e6)
    assert kept.disk == pytest.approx(4 * weights * full.most_runs, abs=1e6)


def test_a_job_is_asked_to_stop_as_early_as_its_checkpoints_take():
    plan = make_plan(load_preset("paper"))
    largest = max(plan.jobs, key=lambda job: job_cost(plan, job).gpus)
    parameters = dimensions(plan.preset.models[largest.sweeps[0].condition.model]).parameters
    assert parameters > 3e10
    # Weights and two moments in fp32 at 200 MB/s, twice; a step of SFT takes little compared with them.
    writing = 2 * 12 * parameters / 200e6
    assert writing < job_cost(plan, largest).saving_seconds < 1.01 * writing
    small = make_plan(load_preset("smoke"))
    assert {job_cost(small, job).saving_seconds for job in small.jobs} == {120}


def test_a_limit_ends_the_longest_job_so_often():
    plan = make_plan(load_preset("smoke"))
    jobs = [replace(job_cost(plan, plan.jobs[0]), minutes=minutes) for minutes in (30, 3000)]
    assert [restarts(jobs, limit) for limit in (3001, 3000, 1440, 60)] == [0, 1, 2, 50]
    assert restarts([], 60) == 0


def test_jobs_have_twice_the_gpus_until_their_waves_take_no_longer_than_they_may():
    preset = load_preset("paper").with_execution(path_hours=None)
    plan, shorter = make_plan(preset), make_plan(preset.with_execution(path_hours=25.0))

    def path(sweep, gpus):
        return len(sweep.expected_waves()) * run_job_seconds(preset, sweep, gpus) / 3600

    assert {shorter.gpus[sweep] // plan.gpus[sweep] for sweep in plan.sweeps} >= {1, 2, 4}
    for sweep in plan.sweeps:
        gpus = shorter.gpus[sweep]
        assert not is_split(preset, sweep, gpus) or path(sweep, gpus) <= 25 or gpus == preset.execution.max_gpus
        assert gpus == plan.gpus[sweep] or path(sweep, gpus // 2) > 25
