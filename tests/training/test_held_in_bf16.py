"""A frozen base whose weights are bf16 numbers gives the same bits when it is held in bf16 alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import PathModel, TinyModel
from lorabench.config.loading import load_preset
from lorabench.models.base import load_model
from lorabench.models.lora import hold_in_bf16
from lorabench.models.passes import trained_parameters
from lorabench.planning.plan import make_plan
from lorabench.runs import Run
from lorabench.store.layout import Layout
from lorabench.training.context import Base, SweepContext
from lorabench.training.run import Machine

from .conftest import condition_of, sweep_of, train, write_tied


def types_of(model):
    """Return the types of a model's weights by the last part of their modules' names."""
    return {name.split(".")[-2]: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("base", "placement"), [("moe-128", "all"), ("tied", "mlp")])
def test_training_gives_the_same_bits(base, placement, data, tmp_path):
    spec = TinyModel(kind="tiny", name="moe-128")
    if base == "tied":
        write_tied(tmp_path / "tied")
        spec = PathModel(kind="path", path=str(tmp_path / "tied"), parameters=1, hidden_size=1)
    condition = replace(condition_of("lora", 4, steps=2, batch_size=2), placement=placement)
    results = []
    for held in (False, True):
        model = load_model(spec)
        if base == "tied":
            # It has random weights, and those of published models are bf16 numbers.
            model.load_state_dict({name: weight.bfloat16() for name, weight in model.state_dict().items()})
        if held:
            hold_in_bf16(model)
            types = types_of(model)
            in_fp32 = {"embed_tokens", "input_layernorm"} | ({"experts", "gate"} if base == "moe-128" else set())
            assert {types[name] for name in in_fp32} == {torch.float32}
            in_bf16 = {"q_proj", "lm_head"} if base == "moe-128" else {"q_proj", "down_proj"}
            assert {types[name] for name in in_bf16} == {torch.bfloat16}
        protocol = Protocol(precision="bf16")
        results.append(train(condition, data, tmp_path / str(held), 3e-3, protocol=protocol, model=model))
    (plain, trained), (other, held) = results
    assert other.curve == plain.curve
    assert other.test_losses == plain.test_losses
    own = trained_parameters(held)
    for name, weight in trained_parameters(trained).items():
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], weight), name


def test_weights_that_bf16_would_round_stay_in_fp32():
    model = load_model(TinyModel(kind="tiny", name="llama-64"))
    layer, other = (model.model.layers[number].mlp.up_proj for number in (0, 1))
    with torch.no_grad():
        layer.weight[3, 4] = 1 + 2**-12
    hold_in_bf16(model)
    assert (layer.weight.dtype, other.weight.dtype) == (torch.float32, torch.bfloat16)


def test_full_fine_tuning_starts_from_the_published_weights_after_lora_held_them_in_bf16():
    preset = load_preset("laptop").model_copy(update={"protocol": Protocol(precision="bf16")})
    machine = Machine(torch.device("cpu"), 4096, autocast=torch.bfloat16)
    plan, base, layout = make_plan(preset), Base(), Layout("laptop", preset)
    lora = sweep_of(plan, "lora")
    fullft = next(s for s in plan.sweeps if (s.condition.model, s.condition.rank) == (lora.condition.model, None))
    with base.trainable(SweepContext(plan, lora, layout, machine), Run(lora.condition, 1e-3, 0)) as model:
        assert types_of(model)["base_layer"] == torch.bfloat16
    with base.trainable(SweepContext(plan, fullft, layout, machine), Run(fullft.condition, 1e-3, 0)) as model:
        published = load_model(preset.models[lora.condition.model])
        for own, weight in zip(model.parameters(), published.parameters(), strict=True):
            assert own.dtype == torch.float32
            assert torch.equal(own, weight)
