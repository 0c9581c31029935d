"""Grouping of sweeps into jobs: each sweep is trained once, a figure needs no other sweeps, and no core waits long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.config.loading import load_preset
from lorabench.config.preset import Preset
from lorabench.planning.memory import gpus_needed
from lorabench.planning.plan import START_SHARE, Plan, make_plan
from lorabench.planning.seconds import flops_per_second, job_seconds, start_seconds
from lorabench.runs import Job

PLANS = {name: make_plan(load_preset(name)) for name in ("laptop", "smollm2", "paper")}


def seconds(plan: Plan, job: Job) -> float:
    return job_seconds(plan.preset, job, max(gpus_needed(plan.preset, sweep) for sweep in job.sweeps))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(PLANS)), st.floats(0.01, 100), st.data())
def test_each_sweep_is_in_one_job_with_others_like_it(name, faster, data):
    preset = PLANS[name].preset
    gflops = faster * flops_per_second(preset.execution) / 1e9
    preset = preset.with_execution(gflops=gflops)
    chosen = data.draw(st.lists(st.sampled_from(PLANS[name].sweeps), unique=True))
    plan = Plan(preset, tuple(chosen))
    assert sorted(sweep.sweep_id for job in plan.jobs for sweep in job.sweeps) == sorted(s.sweep_id for s in chosen)
    for job in plan.jobs:
        kinds = {(sweep.condition.model, sweep.condition.dataset, sweep.condition.task) for sweep in job.sweeps}
        needs = {(sweep.experiments, gpus_needed(preset, sweep)) for sweep in job.sweeps}
        assert len(kinds) == len(needs) == 1
    times = [seconds(plan, job) for job in plan.jobs]
    assert times == sorted(times, reverse=True)
    assert Plan(preset, tuple(chosen)).jobs == plan.jobs


@pytest.mark.parametrize("name", PLANS)
def test_long_sweeps_stay_alone_and_an_experiment_trains_what_it_needs(name):
    plan = PLANS[name]
    start = start_seconds(plan.preset)
    alone = {sweep: seconds(plan, Job((sweep,))) for sweep in plan.sweeps}
    for job in plan.jobs:
        if len(job.sweeps) > 1:
            assert seconds(plan, job) <= max(*alone.values(), 2.5 * start)
            assert max(alone[sweep] for sweep in job.sweeps) - start < start / START_SHARE
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
    # One experiment with the same runs is added, and one with other runs.
    raw_preset["experiments"]["placement"] = raw_preset["experiments"]["rank"]
    assert {job.job_id for job in jobs()} == before
    raw_preset["experiments"]["early"] = [raw_preset["experiments"]["rank"][0] | {"steps": 3}]
    assert {job.job_id for job in jobs()} > before
    raw_preset["experiments"]["rank"] = [raw_preset["experiments"]["rank"][0] | {"seeds": 3}]
    assert not {job.job_id for job in jobs()} & before
    for plan in PLANS.values():
        assert all(len(job.job_id) < 100 for job in plan.jobs)
        # A job is found by its id, and a sweep by its own.
        for job in plan.jobs[:5]:
            assert plan.job(job.job_id) == job
            assert all(plan.job_of(sweep) == job for sweep in job.sweeps)
            assert plan.job(job.sweeps[0].sweep_id) == Job(job.sweeps[:1])
