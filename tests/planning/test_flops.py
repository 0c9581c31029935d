"""FLOPs against the paper's formula and counts on the models."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorabench.config.inputs import TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.specs import Dimensions, dimensions
from lorabench.planning.flops import attention_flops_per_token, linear_flops_per_token, run_tokens
from lorabench.planning.plan import make_plan


@pytest.mark.parametrize(
    # The table of the paper's section on compute efficiency.
    ("width", "rank", "ratio"),
    [(2048, 512, 1.1667), (4096, 1, 0.6672)],
)
def test_lora_takes_two_thirds_and_its_own_part(width, rank, ratio):
    square = Dimensions(width, 4, 16, 16, width // 16, width, width)
    lora = square.lora("all", rank, include_unembedding=True)[1]
    both = linear_flops_per_token(square, lora), linear_flops_per_token(square, None)
    assert both[0] / both[1] == pytest.approx(ratio, abs=5e-5)


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
    one, ten = (attention_flops_per_token(sizes, context) for context in (1000, 10_000))
    assert ten == 10 * one == 4 * 10_000 * 4096 * 32
    assert one / (2 * sizes.active_linear) < 0.05 < 0.3 < ten / (2 * sizes.active_linear)


def test_evaluations_counted_are_those_made():
    from lorabench.training.sft import curve_steps

    preset = load_preset("laptop")
    condition = make_plan(preset).sweeps[0].condition
    dataset = preset.datasets[condition.dataset]
    for steps in (1, 2, 17, 50, 250, 9999):
        examples = len(curve_steps(steps, preset.protocol)) * dataset.validation + dataset.test
        tokens = run_tokens(preset, replace(condition, steps=steps))
        assert tokens.evaluated == examples * tokens.context
