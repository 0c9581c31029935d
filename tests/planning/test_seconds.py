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
from lorabench.planning.flops import linear_flops_per_token, longest_sequence, run_work, unembedding_flops_per_token
from lorabench.planning.plan import make_plan


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


def test_evaluations_counted_are_those_made():
    from lorabench.training.sft import curve_steps

    preset = load_preset("laptop")
    condition = next(s.condition for s in make_plan(preset).sweeps if s.experiments == ("rank",))
    dataset = preset.datasets[condition.dataset]
    for steps in (1, 2, 17, 250, 9999):
        examples = len(curve_steps(steps, preset.protocol)) * dataset.validation + dataset.test
        work = run_work(preset, replace(condition, steps=steps))
        assert work.evaluated == examples * work.context
    # Where the curve is measured on fewer examples, its last point is of all.
    preset = load_preset("core")
    condition = next(s.condition for s in make_plan(preset).sweeps if s.experiments == ("batch_size",))
    points = len(curve_steps(condition.steps, preset.protocol))
    work = run_work(preset, condition)
    assert work.evaluated == ((points - 1) * 128 + 256 + 1024) * work.context


@pytest.mark.parametrize("response", [30, 200])
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
