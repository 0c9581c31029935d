"""What the engine vLLM takes of memory and time."""

from __future__ import annotations

import pytest

from lorabench.config.loading import load_preset
from lorabench.models.specs import dimensions
from lorabench.planning import engine
from lorabench.planning.costs import job_cost
from lorabench.planning.engine import handover_bytes
from lorabench.planning.flops import run_work
from lorabench.planning.memory import sweep_memory
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import evaluation_seconds, flops_per_second, job_seconds, run_seconds

LLAMA_8B = 8_030_261_248


def with_sampler(name, sampler):
    """Return a shipped preset with a sampler, and its plan."""
    preset = load_preset(name).with_execution(sampler=sampler)
    return preset, make_plan(preset)


def engine_memory(preset, sweep):
    """Return the bytes of each engine of a sweep's job."""
    return engine.engine_memory(preset, sweep.condition.model, sweep.condition)


def sweep_of(plan, problems, rank):
    """Return the sweep of a problem set with LoRA of the given rank on all layers, or None for full fine-tuning."""
    placement = None if rank is None else "all"
    wanted = (problems, rank, placement)
    return next(s for s in plan.sweeps if (s.condition.dataset, s.condition.rank, s.condition.placement) == wanted)


def test_the_engine_of_llama_8b_holds_weights_adapters_and_cache():
    paper, plan = with_sampler("paper", "vllm")
    full, rank_4 = (sweep_of(plan, "gsm8k", rank) for rank in (None, 4))
    held = engine_memory(paper, full)
    assert (held.weights, held.adapters) == (2 * LLAMA_8B, 0)
    # As many responses of 100 + 200 tokens as the cache has room for; 18 bytes of each of their logits.
    assert engine.engine_batch(paper, full.condition) == (196_608 // 300, 4096)
    assert held.overhead == 2.5e9 + 4096 * 6 * (4096 + 14_336) + 18 * 655 * 128_256
    # Keys and values of 32 layers, 8 heads of 128 numbers of 2 bytes.
    assert held.cache == 196_608 * 32 * 2 * 8 * 128 * 2
    # An adapter of rank 4 takes the room of rank 8, and is handed over in fp32.
    adapter = dimensions(paper.models["llama-3-1-8b-base"]).lora("all", 8, True)[0]
    assert engine_memory(paper, rank_4).adapters == 2 * adapter
    assert handover_bytes(paper, rank_4.condition) == 4 * adapter / 2
    # All weights are written and read at 2 GB/s each.
    assert handover_bytes(paper, full.condition) == 2 * LLAMA_8B
    # A tied unembedding that is trained is a weight of its own.
    core, plan = with_sampler("core", "vllm")
    full, lora = (sweep_of(plan, "gsm8k", rank) for rank in (None, 1))
    assert engine_memory(core, full).weights - engine_memory(core, lora).weights == 2 * 128_256 * 2048


def test_the_engine_is_held_while_the_trainer_computes_and_replaces_its_sampling():
    (own, own_plan), (vllm, vllm_plan) = (with_sampler("paper", sampler) for sampler in ("own", "vllm"))
    for rank, gpus in ((None, 4), (16, 1)):
        before, sweep = sweep_of(own_plan, "math", rank), sweep_of(vllm_plan, "math", rank)
        alone, with_engine = sweep_memory(own, before, gpus), sweep_memory(vllm, sweep, gpus)
        assert (alone.engine, with_engine.sampling) == (0, 0)
        assert with_engine.engine == sum(engine_memory(vllm, sweep))
        assert (
            with_engine.total
            >= with_engine.weights
            + with_engine.moments
            + with_engine.engine
            + with_engine.gradients
            + with_engine.activations
        )
        if gpus > 1:
            # A sharded model is no longer copied whole into each process.
            assert alone.weights - with_engine.weights > 2 * LLAMA_8B


def test_jobs_take_less_time_and_ask_for_the_memory_of_the_host():
    (own, own_plan), (vllm, vllm_plan) = (with_sampler("core", sampler) for sampler in ("own", "vllm"))
    before, after = (sweep_of(plan, "deepmath", 16) for plan in (own_plan, vllm_plan))
    assert sum(run_seconds(vllm, after, 1)) < sum(run_seconds(own, before, 1)) / 3
    assert evaluation_seconds(vllm, vllm_plan.evaluations()[0]) < evaluation_seconds(own, own_plan.evaluations()[0])
    job = next(job for job in vllm_plan.jobs if job.sweeps == (after,))
    other = next(job for job in own_plan.jobs if job.sweeps == (before,))
    # The engine's process, and twice an adapter; the start of the engine is counted once for a job.
    extra = job_cost(vllm_plan, job).mem_mb - job_cost(own_plan, other).mem_mb
    assert extra == pytest.approx(1.25 * (6000 + 2 * handover_bytes(vllm, after.condition) / 1e6), abs=1)
    runs = after.n_runs * sum(run_seconds(vllm, after, 1))
    loading = 4 * dimensions(vllm.models["qwen3-1-7b-base"]).parameters / 1e9
    assert job_seconds(vllm, job, 1) == pytest.approx(60 + 90 + runs + loading)


def test_a_plan_on_a_cpu_knows_the_engine():
    (own, own_plan), (vllm, vllm_plan) = (with_sampler("smoke", sampler) for sampler in ("own", "vllm"))
    before, after = (
        next(job for job in plan.jobs if job.sweeps[0].condition.rollouts) for plan in (own_plan, vllm_plan)
    )
    held = engine_memory(vllm, after.sweeps[0])
    sizes = dimensions(vllm.models[after.sweeps[0].condition.model])
    assert (held.weights, held.overhead) == (4 * sizes.parameters, 1e9)
    assert held.cache == vllm.execution.max_cache_tokens * sizes.layers * 2 * sizes.kv_heads * sizes.head_dim * 4
    assert job_cost(vllm_plan, after).mem_mb > job_cost(own_plan, before).mem_mb + 1000
    # The engine starts, and draws more slowly than the own sampler; nothing else takes longer.
    flops = sum(sweep.n_runs * run_work(vllm, sweep.condition).drawn_flops for sweep in after.sweeps)
    drawn = 3.0 * flops / flops_per_second(vllm.execution)
    assert job_seconds(vllm, after, 0) - job_seconds(own, before, 0) == pytest.approx(20 + (4.2 - 1) * drawn)
