"""Grouping of sweeps into jobs: each sweep is trained once, a figure needs no other sweeps, and no core waits long."""

import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config.loading import load_preset
from lorabench.config.preset import Preset
from lorabench.planning.plan import START_SHARE, Plan, make_plan, merged
from lorabench.planning.seconds import job_seconds, start_seconds
from lorabench.runs import Job

NAMES = ("laptop", "smollm2", "paper")


@cache
def plan_of(name: str) -> Plan:
    return make_plan(load_preset(name))


def at_speed(preset: Preset, faster: float) -> Preset:
    """Return a preset whose machine is so many times as fast."""
    execution = preset.execution
    if execution.gflops is None:
        return preset.with_execution(gpu_time=execution.gpu_time / faster)
    return preset.with_execution(gflops=faster * execution.gflops)


def seconds(plan: Plan, job: Job) -> float:
    return job_seconds(plan.preset, job, max(plan.gpus[sweep] for sweep in job.sweeps))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("faster", [0.02, 1.0, 50.0])
def test_each_sweep_is_in_one_job_with_others_like_it_and_long_ones_stay_alone(name, faster):
    preset = plan_of(name).preset
    preset = at_speed(preset, faster)
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


def by_trying_every_number(jobs, least, most):
    """Merge jobs as `merged` does, by its definition: one more until none is too long."""
    for count in range(least, len(jobs) + 1):
        longer = [(0.0, []) for _ in range(count)]
        for seconds, sweeps in jobs:
            shortest = min(range(count), key=lambda number: longer[number][0])
            longer[shortest] = longer[shortest][0] + seconds, longer[shortest][1] + sweeps
        if max(seconds for seconds, _ in longer) <= most:
            return longer
    return []


@pytest.mark.parametrize("name", ["laptop", "smollm2", "core"])
@pytest.mark.parametrize("faster", [0.2, 1.0, 50.0, 1000.0])
def test_sweeps_are_in_the_jobs_that_trying_every_number_gives(name, faster, monkeypatch):
    preset = plan_of(name).preset
    preset = at_speed(preset, faster)
    jobs = Plan(preset, plan_of(name).sweeps).jobs
    monkeypatch.setattr("lorabench.planning.plan.merged", by_trying_every_number)
    assert Plan(preset, plan_of(name).sweeps).jobs == jobs


@given(
    seconds=st.lists(st.floats(0.01, 10), min_size=1, max_size=40),
    least=st.integers(1, 40),
    most=st.floats(10, 40),
)
def test_any_jobs_are_merged_so(seconds, least, most):
    jobs = [(each, [str(number)]) for number, each in enumerate(seconds)]
    assert merged(jobs, min(least, len(jobs)), most) == by_trying_every_number(jobs, min(least, len(jobs)), most)
    assert merged([], 1, most) == []


def test_thousands_of_sweeps_are_grouped_within_seconds(raw_preset):
    """Of 5,000 short sweeps of many lengths; with their square it would take minutes."""
    raw_preset["datasets"]["instruct"]["train"], raw_preset["execution"]["gflops"] = 400, 60.0
    block = raw_preset["experiments"]["rank"][0] | {"lrs": {"fullft": [], "lora": [1e-3]}, "ranks": {"all": [4]}}
    block |= {"batch_sizes": list(range(1, 101)), "alphas": [1 + number / 100 for number in range(50)], "seeds": 1}
    plan = make_plan(Preset.model_validate(raw_preset | {"experiments": {"rank": [block]}}))
    start = time.process_time()
    assert 1000 < len(plan.jobs) < 2000 < len(plan.sweeps) == 5000
    # It took 0.3 s on an EPYC beside other work.
    assert time.process_time() - start < 5
