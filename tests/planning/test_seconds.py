"""Seconds of a run: launches of layers, long responses, and experts."""

from __future__ import annotations

import pytest

from lorabench.config.loading import load_preset
from lorabench.models.specs import dimensions
from lorabench.planning.flops import run_flops, run_tokens
from lorabench.planning.memory import decided
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import flops_per_second, run_seconds, sweep_seconds


def test_launching_layers_bounds_the_time_of_a_small_model():
    preset = load_preset("smollm2")
    layers = dimensions(preset.models["smollm2-135m"]).layers
    plan = make_plan(preset)
    sweep = next(s for s in plan.sweeps if (s.condition.dataset, s.condition.rank) == ("worked", 16))
    # A forward and a backward pass for each batch, and a forward pass for each micro-batch that is evaluated.
    tokens = run_tokens(preset, sweep.condition)
    passes = 3 * sweep.condition.steps + tokens.evaluated / preset.execution.max_batch_tokens
    assert sum(run_seconds(preset, sweep, 1)) == pytest.approx(passes * layers * 0.8e-3)


def test_long_responses_cost_more_than_their_tokens():
    paper = load_preset("paper").with_execution(sampler="own")
    plan = make_plan(paper)
    gsm8k, deepmath = (
        next(s for s in plan.sweeps if s.condition.dataset == name and s.condition.method == "lora")
        for name in ("gsm8k", "deepmath")
    )
    per_token = [
        sweep_seconds(paper, sweep, 1) / sweep.n_runs / run_tokens(paper, sweep.condition).drawn
        for sweep in (gsm8k, deepmath)
    ]
    assert per_token[1] > 3 * per_token[0]


def test_experts_take_twice_the_time_and_lora_is_added_to_each_of_them():
    paper = load_preset("paper")
    sizes = dimensions(paper.models["qwen3-30b-a3b-base"])
    in_experts = [matrix for matrix in sizes.matrices if matrix.part == "experts"]
    share = sum(m.active * m.d_in * m.d_out for m in in_experts) / sizes.active_linear
    assert share == pytest.approx(0.598, abs=0.001)
    seconds = {}
    for sweep in make_plan(paper).sweeps:
        condition = sweep.condition
        if condition.model == "qwen3-30b-a3b-base" and condition.method == "lora":
            flops = run_flops(decided(paper, sweep), condition)
            computed = (flops.trained + flops.evaluated + flops.recomputed) / flops_per_second(paper.execution, 4)
            seconds[condition.placement] = run_seconds(paper, sweep, 4)[0], computed * (1 + share)
    assert seconds["attn"][0] == pytest.approx(seconds["attn"][1])
    # In each pass over 16,384 tokens, 28 billion parameters are read and written a few times.
    assert 1.1 < seconds["mlp"][0] / seconds["mlp"][1] < 2
