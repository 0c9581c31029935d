"""The ratio of learning rates from a first step, on gradients and losses whose answer is known."""

import math

import numpy as np
import pytest
import torch

from lorabench.config.inputs import TinyModel
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.base import load_model
from lorabench.training.run import Machine
from studies.lr_ratio.scripts.first_step import best_lr, first_ratio, layer_inputs, mean_share, without


def uniform(rank: int, d_in: int = 256) -> torch.Tensor:
    return (2 * torch.rand(rank, d_in, generator=torch.Generator().manual_seed(rank)) - 1) / math.sqrt(d_in)


def test_even_inputs_give_sqrt_3_width_over_alpha_and_few_large_ones_give_less():
    even = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    expected, total = math.sqrt(3) * 256 / 32, float(even.abs().sum())
    for rank in (4, 64):
        assert first_ratio(total, {"even": even}, {"even": uniform(rank)}) == pytest.approx(expected, rel=0.05)
    # All of the gradient is in a quarter of the inputs.
    few = even * (torch.arange(256) < 64)
    a = uniform(64)
    assert first_ratio(float(few.abs().sum()), {"few": few}, {"few": a}) == pytest.approx(expected / 2, rel=0.1)
    # A weight that only full fine-tuning trains raises the ratio.
    assert first_ratio(2 * total, {"even": even}, {"even": a}) == pytest.approx(2 * expected, rel=0.05)


@pytest.mark.parametrize("start", [1e-5, 1.0])
def test_the_walk_finds_the_lowest_loss_from_either_side(start: float):
    seen = []

    def loss(lr: float) -> float:
        seen.append(lr)
        return math.log(lr / 3e-3) ** 2

    assert best_lr(loss, start) == pytest.approx(3e-3)
    assert len(seen) == len(set(seen))


def test_a_without_the_mean_input_does_not_see_it():
    mean, a = torch.randn(8), torch.randn(3, 8)
    changed = without(a, mean)
    assert changed @ mean == pytest.approx(0, abs=1e-5)
    other = torch.randn(8)
    other -= mean * (other @ mean) / (mean @ mean)
    assert torch.allclose(changed @ other, a @ other, atol=1e-5)


def test_the_mean_input_is_all_of_equal_inputs_and_nothing_of_opposite_ones():
    model = load_model(TinyModel(kind="tiny", name="llama-64"))
    # The last of these is no input.
    ids = np.arange(65, dtype=np.int32) % 16
    split = TokenizedSplit(ids=ids, scored=np.ones(65, bool), offsets=np.array([0, 65]))
    machine = Machine(torch.device("cpu"), 4096)
    assert 0.05 < mean_share(layer_inputs(model, split, machine)) < 0.5
    embedding = model.get_input_embeddings().weight.data
    embedding[:] = embedding[3]
    inputs = layer_inputs(model, split, machine)
    assert mean_share(inputs) == pytest.approx(1, abs=1e-4)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.allclose(inputs[first].mean, model.model.layers[0].input_layernorm(embedding[3]), atol=1e-5)
    # Of A x, where A is a row of ones and one of twos.
    factors = {name: torch.outer(torch.tensor([1.0, 2.0]), torch.ones(len(seen.mean))) for name, seen in inputs.items()}
    total = inputs[first].mean.sum().item()
    seen = layer_inputs(model, split, machine, factors)[first]
    assert torch.allclose(seen.mean, torch.tensor([total, 2 * total]), atol=1e-4)
    assert seen.square == pytest.approx(5 * total**2, rel=1e-3)
    embedding[1::2] *= -1
    assert layer_inputs(model, split, machine)[first].share == pytest.approx(0, abs=1e-6)
