"""What the engine vLLM takes of memory and time."""

from __future__ import annotations

from lorabench.config.loading import load_preset
from lorabench.estimates.engine import engine_memory, handover_bytes
from lorabench.estimates.memory import sweep_memory
from lorabench.models.dimensions import dimensions
from lorabench.planning.plan import make_plan

from ..handmade.presets import with_execution

LLAMA_8B = 8_030_261_248


def sweep_of(plan, problems, rank):
    """Return the sweep of a problem set with LoRA of the given rank on all layers, or None for full fine-tuning."""
    placement = None if rank is None else "all"
    wanted = (problems, rank, placement)
    return next(s for s in plan.sweeps if (s.condition.dataset, s.condition.rank, s.condition.placement) == wanted)


def test_the_engine_of_llama_8b_holds_weights_adapters_and_cache():
    paper = with_execution(load_preset("paper"), sampler="vllm")
    plan = make_plan(paper)
    full, rank_4 = (sweep_of(plan, "gsm8k", rank) for rank in (None, 4))
    engine = engine_memory(paper, full)
    assert (engine.weights, engine.adapters, engine.overhead) == (2 * LLAMA_8B, 0, 2.5e9)
    # Keys and values of 32 layers, 8 heads of 128 numbers of 2 bytes.
    assert engine.cache == 196_608 * 32 * 2 * 8 * 128 * 2
    # An adapter of rank 4 takes the room of rank 8.
    adapter = dimensions(paper.models["llama-3-1-8b-base"]).lora("all", 8, True)[0]
    assert engine_memory(paper, rank_4, lanes=3).adapters == 3 * 2 * adapter
    assert handover_bytes(paper, full) == 2 * LLAMA_8B
    assert handover_bytes(paper, rank_4, lanes=3) == 3 * 4 * adapter / 2


def test_the_engine_is_held_while_the_trainer_computes_and_replaces_its_sampling():
    own = load_preset("paper")
    vllm = with_execution(own, sampler="vllm")
    for rank, gpus in ((None, 4), (16, 1)):
        alone, beside = (
            sweep_memory(preset, sweep_of(make_plan(preset), "math", rank), gpus) for preset in (own, vllm)
        )
        assert (alone.engine, beside.sampling) == (0, 0)
        assert beside.total >= beside.weights + beside.moments + beside.engine + beside.gradients + beside.activations
    # A sharded model is no longer copied whole into each process.
    full = sweep_of(make_plan(own), "math", None)
    assert (
        sweep_memory(own, full, 4).weights - sweep_memory(vllm, sweep_of(make_plan(vllm), "math", None), 4).weights
        > 2 * LLAMA_8B
    )
