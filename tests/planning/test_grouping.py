"""Grouping of sweeps into jobs: each sweep is trained once, a figure needs no other sweeps, and no core waits long."""

from functools import cache

import pytest

from lorabench.config.loading import load_preset
from lorabench.config.preset import Preset
from lorabench.planning.plan import START_SHARE, Plan, make_plan
from lorabench.planning.seconds import flops_per_second, job_seconds, start_seconds
from lorabench.runs import Job

NAMES = ("laptop", "smollm2", "paper")


@cache
def plan_of(name: str) -> Plan:
    return make_plan(load_preset(name))


def seconds(plan: Plan, job: Job) -> float:
    return job_seconds(plan.preset, job, max(plan.gpus[sweep] for sweep in job.sweeps))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("faster", [0.02, 1.0, 50.0])
def test_each_sweep_is_in_one_job_with_others_like_it_and_long_ones_stay_alone(name, faster):
    preset = plan_of(name).preset
    preset = preset.with_execution(gflops=faster * flops_per_second(preset.execution) / 1e9)
    plan, start = Plan(preset, plan_of(name).sweeps), start_seconds(preset)
    assert sorted(s.sweep_id for job in plan.jobs for s in job.sweeps) == sorted(s.sweep_id for s in plan.sweeps)
    alone = {sweep: seconds(plan, Job((sweep,))) for sweep in plan.sweeps}
    for job in plan.jobs:
        kinds = {(sweep.condition.model, sweep.condition.dataset, sweep.condition.task) for sweep in job.sweeps}
        assert len(kinds) == len({(sweep.experiments, plan.gpus[sweep]) for sweep in job.sweeps}) == 1
        if len(job.sweeps) > 1:
            assert seconds(plan, job) <= max(*alone.values(), 2.5 * start)
            assert max(alone[sweep] for sweep in job.sweeps) - start < start / START_SHARE
    times = [seconds(plan, job) for job in plan.jobs]
    assert times == sorted(times, reverse=True)
    # An experiment trains what it needs.
    for experiment in plan.preset.experiments.trained():
        trained = {sweep for job in plan.jobs_of(experiment) for sweep in job.sweeps}
        assert trained == {sweep for sweep in plan.sweeps if experiment in sweep.experiments}


def test_ids_are_names_of_files_and_hold_as_long_as_the_sweeps_do(raw_preset):
    # At this speed the work takes no time compared with a start.
    raw_preset["execution"]["gflops"] = 1e6

    def jobs():
        return make_plan(Preset.model_validate(raw_preset)).jobs

    before = {job.job_id for job in jobs()}
    assert len(before) == 1
    raw_preset["experiments"]["placement"] = raw_preset["experiments"]["rank"]
    assert {job.job_id for job in jobs()} == before
    raw_preset["experiments"]["early"] = [raw_preset["experiments"]["rank"][0] | {"steps": 3}]
    assert {job.job_id for job in jobs()} > before
    raw_preset["experiments"]["rank"] = [raw_preset["experiments"]["rank"][0] | {"seeds": 3}]
    assert not {job.job_id for job in jobs()} & before
    for plan in map(plan_of, NAMES):
        for job in plan.jobs:
            assert len(job.job_id) < 100
            assert plan.job(job.job_id) == job
            assert plan.job(job.sweeps[0].sweep_id) == Job(job.sweeps[:1])
