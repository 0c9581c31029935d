"""What jobs cost and request: never less than the estimate, and shared runs once."""

import pytest

from lorabench.config.loading import load_preset
from lorabench.errors import UserError
from lorabench.models.specs import dimensions
from lorabench.planning import memory
from lorabench.planning.costs import compute_cost, evaluation_cost, job_cost, path_hours, per_experiment
from lorabench.planning.flops import lora_parameters
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import is_split, job_seconds
from lorabench.runs import Job

from ..handmade import with_model

LLAMA_8B = 8_030_261_248


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_every_job_asks_for_something_sensible(name):
    plan = make_plan(load_preset(name))
    execution = plan.preset.execution
    trained = {job: job_cost(plan, job) for job in plan.jobs}
    costs = [*trained.values(), compute_cost(plan), *(evaluation_cost(plan, job) for job in plan.evaluations())]
    for cost in costs:
        assert cost.gpus in ((0,) if execution.gpu is None else (1, 2, 4, 8))
        assert cost.gpus <= execution.max_gpus
        assert cost.cpus == execution.threads * max(1, cost.gpus)
        assert min(cost.memory, 1e6 * cost.mem_mb) > 300e6
        assert cost.disk >= 1e6
    for job, cost in trained.items():
        parts = job.n_runs if plan.is_split(job) else 1
        assert cost.minutes * 60 > job_seconds(plan.preset, job, cost.gpus) / parts
    whole = per_experiment(plan)["total"]
    assert whole.gpus == max(cost.gpus for cost in costs)
    assert (whole.gpus > 1) == (name == "paper")
    assert max(path_hours(plan, job) for job in plan.jobs) < whole.job_hours


def test_what_fits_nowhere_is_one_sentence():
    paper = load_preset("paper")
    small = with_model(paper.with_execution(gpu="RTX-4090", max_gpus=2), models=["llama-3-1-8b-base"])
    with pytest.raises(UserError, match=r"full fine-tuning of llama-3-1-8b-.* needs \d+ GB on each of 2 x RTX"):
        per_experiment(make_plan(small))
    plan = make_plan(paper.with_execution(gpu="L40S", sampler="own"))
    job = next(job for job in plan.evaluations() if job.model == "llama-3-1-8b-base")
    with pytest.raises(UserError, match="the evaluation needs 56 GB for llama-3-1-8b-base on one L40S, which has 44"):
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
    # A run's job is given the time of one run, and a whole job that of as many as are possible.
    assert alone.minutes > sweep.n_runs * cost.minutes
    # Of each run at work there are two checkpoints for a moment, beside the weights of all runs.
    trained = lora_parameters(whole, dimensions(whole.models[sweep.condition.model]), sweep.condition.rank, "all")[0]
    assert cost.working_disk - alone.working_disk == pytest.approx((max(waves) - 1) * 2 * 12 * trained, abs=2e6)
    assert path_hours(plan, job) == pytest.approx(len(waves) * cost.longest_job_hours)


def test_disk_and_the_time_to_stop_follow_the_weights():
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
    # Weights and two moments in fp32 at 200 MB/s, twice; a step of SFT takes little compared with them.
    assert 2 * 12 * weights / 200e6 < best.saving_seconds < 1.1 * 2 * 12 * weights / 200e6


def test_jobs_have_twice_the_gpus_until_their_waves_take_no_longer_than_they_may():
    preset = load_preset("paper").with_execution(path_hours=None)
    plan, shorter = make_plan(preset), make_plan(preset.with_execution(path_hours=25.0))

    def path(sweep, gpus):
        return len(sweep.expected_waves()) * job_seconds(preset, Job((sweep,)), gpus, "one") / 3600

    assert {shorter.gpus[sweep] // plan.gpus[sweep] for sweep in plan.sweeps} >= {1, 2, 4}
    for sweep in plan.sweeps:
        gpus = shorter.gpus[sweep]
        assert not is_split(preset, sweep, gpus) or path(sweep, gpus) <= 25 or gpus == preset.execution.max_gpus
        assert gpus == plan.gpus[sweep] or path(sweep, gpus // 2) > 25


def rl_job(preset, problems, rank):
    """Return the plan of a preset, and its job of a problem set with LoRA on all layers, or with full fine-tuning."""
    plan, wanted = make_plan(preset), (problems, rank, rank and "all")
    for sweep in plan.sweeps:
        condition = sweep.condition
        if (condition.dataset, condition.rank, condition.placement) == wanted:
            return plan, Job((sweep,)), condition
    raise AssertionError(wanted)


def test_the_engine_of_llama_8b_holds_weights_adapters_and_cache():
    paper = load_preset("paper")
    assert paper.execution.sampler == "vllm"
    _, _, full = rl_job(paper, "gsm8k", None)
    total, cache = memory.engine_memory(paper, full.model, full)
    # As many responses of 100 + 200 tokens as the cache has room for; 18 bytes of each of their logits.
    assert memory.engine_batch(paper, full) == (196_608 // 300, 4096)
    # Keys and values of 32 layers, 8 heads of 128 numbers of 2 bytes.
    assert cache == 196_608 * 32 * 2 * 8 * 128 * 2
    assert total - cache - 2 * LLAMA_8B == 2.5e9 + 4096 * 6 * (4096 + 14_336) + 18 * 655 * 128_256
    # An adapter of rank 4 takes the room of rank 8.
    _, _, rank_4 = rl_job(paper, "gsm8k", 4)
    adapter = dimensions(paper.models[full.model]).lora("all", 8, True)[0]
    assert memory.engine_memory(paper, full.model, rank_4)[0] - total == 2 * adapter
