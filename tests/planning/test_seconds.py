"""Tokens and FLOPs against counts of models, and seconds of runs: launches of layers, long responses, and experts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from lorabench.config.inputs import TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning import flops
from lorabench.planning.flops import (
    attention_flops_per_token,
    linear_flops_per_token,
    longest_sequence,
    run_work,
    unembedding_flops_per_token,
)
from lorabench.planning.memory import decided
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import PASS_TOKENS, flops_per_second, padded_tokens, padding, run_seconds


@pytest.mark.parametrize(
    # The table of the paper's section on compute efficiency.
    ("width", "rank", "ratio"),
    [(2048, 512, 1.1667), (4096, 1, 0.6672)],
)
def test_lora_takes_two_thirds_and_its_own_part(width, rank, ratio):
    square = Dimensions(width, 4, 16, 16, width // 16, width, width)
    lora = square.lora("all", rank, include_unembedding=True)[1]
    assert linear_flops_per_token(square, lora) / linear_flops_per_token(square, None) == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "placement", "rank"),
    [("llama-128", None, None), ("qwen-64", "attn", 3), ("llama-128", "mlp", 5), ("moe-128", "all", 8)],
)
def test_flops_are_those_of_the_model_itself(name, placement, rank):
    from lorabench.models.base import load_model
    from lorabench.models.counts import train_flops_per_token
    from lorabench.models.lora import add_lora

    spec = TinyModel(kind="tiny", name=name)
    model, lora = load_model(spec), None
    if rank is not None:
        model, lora = add_lora(model, rank, placement, 32.0, True, 0), dimensions(spec).lora(placement, rank, True)[1]
    assert linear_flops_per_token(dimensions(spec), lora) == train_flops_per_token(model)


def test_attention_grows_with_the_context_and_matters_when_it_is_long():
    sizes = dimensions(load_preset("paper").models["llama-3-1-8b-base"])
    short, long = (attention_flops_per_token(sizes, context) for context in (1000, 10_000))
    assert long == 10 * short == 4 * 10_000 * 4096 * 32
    assert short / (2 * sizes.active_linear) < 0.05 < 0.3 < long / (2 * sizes.active_linear)


def test_evaluations_counted_are_those_made():
    from lorabench.training.sft import curve_steps

    preset = load_preset("laptop")
    condition = make_plan(preset).jobs_of("rank")[0].sweeps[0].condition
    dataset = preset.datasets[condition.dataset]
    for steps in (1, 2, 17, 250, 9999):
        examples = len(curve_steps(steps, preset.protocol)) * dataset.validation + dataset.test
        work = run_work(preset, replace(condition, steps=steps))
        assert work.evaluated == examples * work.context
    # Where the curve is measured on fewer examples, its last point is of all.
    preset = load_preset("core")
    condition = make_plan(preset).jobs_of("batch_size")[0].sweeps[0].condition
    points = len(curve_steps(condition.steps, preset.protocol))
    work = run_work(preset, condition)
    assert work.evaluated == ((points - 1) * 128 + 256 + 1024) * work.context


def test_padding_is_that_of_the_micro_batches_of_training():
    from lorabench.training.loss import PASS_TOKENS as FIXED
    from lorabench.training.loss import micro_batches

    assert FIXED["cuda"] == PASS_TOKENS
    draw = np.random.default_rng(0)
    for size, limit in ((1, 100), (16, 8192), (32, 8192), (128, 20000), (40, 10)):
        lengths = np.ceil(draw.lognormal(5.5, 1, size)).astype(int)
        parts = micro_batches(lengths, limit, PASS_TOKENS)
        assert padded_tokens(lengths.tolist(), limit) == sum(len(part) * lengths[part].max() for part in parts)


def test_small_batches_of_lengths_that_differ_are_padded():
    core = load_preset("core")
    sweeps = make_plan(core).sweeps
    tulu, facts, traces = (
        next(sweep.condition for sweep in sweeps if sweep.condition.dataset == name)
        for name in ("tulu3", "facts", "openthoughts3")
    )
    small, whole, shared = (
        padding(core, replace(tulu, batch_size=size), gpus) for size, gpus in ((16, 1), (128, 1), (128, 8))
    )
    assert 1.2 < small == shared < 1.5
    assert 1.05 < whole < 1.2
    assert 1 <= padding(core, traces, 1) < 1.05
    assert padding(core, facts, 1) == padding(core, next(s.condition for s in sweeps if s.condition.rollouts), 1) == 1
    # Padding takes time, and is counted neither as tokens nor as useful FLOPs.
    keeping, sweep = core.with_execution(activation_checkpointing=False), next(s for s in sweeps if s.condition == tulu)
    work, (computing, _) = run_work(keeping, tulu), run_seconds(keeping, sweep, 1)
    useful = work.trained_flops + work.evaluated_flops
    assert 1.05 < computing * flops_per_second(core.execution) / useful < padding(core, tulu, 1)


@pytest.mark.parametrize("rank", [None, 8])
def test_logits_are_computed_of_scored_tokens_only(rank, monkeypatch):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lorabench.models.base import load_model
    from lorabench.models.lora import add_lora
    from lorabench.training import loss

    preset = load_preset("laptop")
    condition = replace(make_plan(preset).sweeps[0].condition, model="tiny", rank=rank, placement=rank and "all")
    model = load_model(preset.models["tiny"])
    if rank:
        model = add_lora(model, rank, "all", 32.0, True, 0)
    inputs, targets = torch.randint(1024, (2, 2, 64))
    # The last MLP is not computed for them either, which the plan does not count.
    monkeypatch.setattr(loss, "computing_only", lambda *_: nullcontext())
    counts = []
    for unscored in (0, 16):
        targets[:, :unscored] = loss.IGNORED
        with FlopCounterMode(display=False) as counter:
            loss.add_gradient(model, loss.Batch(inputs, targets), 1, None, None)
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == 2 * 16 * unembedding_flops_per_token(preset, condition)[0]
    # Prompts of the hub are not scored, nor are those of RL.
    core = load_preset("core")
    works = {s.condition.dataset: run_work(core, s.condition) for s in make_plan(core).sweeps}
    assert works["tulu3"].trained_scored == 0.5 * works["tulu3"].trained
    assert works["openthoughts3"].trained_scored > 0.96 * works["openthoughts3"].trained
    assert works["facts"].trained_scored == works["facts"].trained
    assert 0.8 < works["math"].trained_scored / works["math"].trained < 1
    assert works["math"].evaluated_scored == 0


@pytest.mark.parametrize("response", [30, 60, 200])
def test_the_attention_of_rl_is_that_of_the_rows_it_learns_from(response, monkeypatch):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from lorabench.models.base import load_model
    from lorabench.training.rl import objective
    from lorabench.training.rl.sampler import Response
    from lorabench.training.run import Machine

    # At most 128 tokens share a row, so that responses of 200 tokens have one each.
    for module in (flops, objective):
        monkeypatch.setattr(module, "SHARED_ROW", 128)
    monkeypatch.setattr(objective, "computing_only", lambda *_: nullcontext())
    preset = load_preset("laptop")
    condition = next(sweep.condition for sweep in make_plan(preset).sweeps if sweep.condition.rollouts)
    rollouts = replace(condition.rollouts, mean_response_tokens=response, max_new_tokens=2 * response)
    size = rollouts.group_size
    condition = replace(condition, rollouts=rollouts, steps=1, batch_size=2 * size, rank=None, placement=None)
    work = run_work(preset, condition)
    prompt, draw = (1,) * (longest_sequence(preset, condition) - 2 * response), np.random.default_rng(0)
    groups = [
        objective.ResponseGroup.of(
            prompt,
            [Response(draw.integers(999, size=response), np.zeros(response), False) for _ in range(size)],
            np.eye(size)[0],
        )
        for _ in range(2)
    ]
    model = load_model(preset.models[condition.model])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective.backward(model, groups, Machine(torch.device("cpu"), preset.execution.max_batch_tokens))
    unscored = (work.trained - work.trained_scored) * unembedding_flops_per_token(preset, condition)[0]
    # With attention to the response alone it would be off by a tenth where rows are shared.
    assert counter.get_total_flops() == pytest.approx(work.trained_flops - unscored, rel=0.05)


def test_launching_layers_bounds_the_time_of_a_small_model():
    preset = load_preset("smollm2")
    layers = dimensions(preset.models["smollm2-135m"]).layers
    sweep = next(s for s in make_plan(preset).sweeps if (s.condition.dataset, s.condition.rank) == ("worked", 16))
    # A forward and a backward pass for each batch, and a forward pass for each micro-batch that is evaluated.
    work = run_work(preset, sweep.condition)
    passes = 3 * sweep.condition.steps + work.evaluated / preset.execution.max_batch_tokens
    assert sum(run_seconds(preset, sweep, 1)) == pytest.approx(passes * layers * 0.8e-3)


def test_long_responses_cost_more_than_their_tokens():
    paper = load_preset("paper").with_execution(sampler="own")
    lora = [sweep for sweep in make_plan(paper).sweeps if sweep.condition.method == "lora"]
    gsm8k, deepmath = (
        sum(run_seconds(paper, sweep, 1)) / run_work(paper, sweep.condition).drawn
        for sweep in (next(s for s in lora if s.condition.dataset == name) for name in ("gsm8k", "deepmath"))
    )
    assert deepmath > 3 * gsm8k


def test_experts_take_twice_the_time_and_lora_is_added_to_each_of_them():
    paper = load_preset("paper")
    sizes = dimensions(paper.models["qwen3-30b-a3b-base"])
    in_experts = [matrix for matrix in sizes.matrices if matrix.part == "experts"]
    share = sum(m.active * m.d_in * m.d_out for m in in_experts) / sizes.active_linear
    assert share == pytest.approx(0.598, abs=0.001)
    ratios = {}
    for sweep in make_plan(paper).sweeps:
        condition = sweep.condition
        if condition.model == "qwen3-30b-a3b-base" and condition.method == "lora":
            work, padded = run_work(decided(paper, sweep, 4), condition), padding(paper, condition, 4)
            flops = padded * (work.trained_flops + work.recomputed_flops) + work.evaluated_flops
            training, forward = unembedding_flops_per_token(paper, condition)
            unscored = (padded * work.trained - work.trained_scored) * training
            unscored += (work.evaluated - work.evaluated_scored) * forward
            if condition.placement != "attn":
                # The gradient of the experts' whole weights.
                flops += padded * work.trained * 2 * share * sizes.active_linear
            computed = (flops * (1 + share) - unscored) / flops_per_second(paper.execution, 4)
            ratios[condition.placement] = run_seconds(paper, sweep, 4)[0] / computed
    assert ratios["attn"] == pytest.approx(1)
    # In each pass over 16,384 tokens, 28 billion parameters are read and written a few times.
    assert 1.1 < ratios["mlp"] < 2


def test_lora_on_experts_computes_the_gradient_of_their_whole_weights():
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from lorabench.models.base import load_model
    from lorabench.models.lora import add_lora
    from lorabench.training.loss import Batch, add_gradient

    products = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products[-1] += func is torch.ops.aten._grouped_mm.default
            return func(*args, **(kwargs or {}))

    for placement in (None, "attn", "all"):
        model = load_model(TinyModel(kind="tiny", name="moe-128"))
        if placement:
            model = add_lora(model, 8, placement, 32.0, True, 0)
        products.append(0)
        with Counter():
            add_gradient(model, Batch(*torch.randint(1024, (2, 1, 8))), 1, None, None)
    # Three layers have two products each: forward, for the gradient of the input, and for that of the weights.
    assert products == [18, 12, 18]
