"""The ratio of learning rates from a first step, on gradients and losses whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.lr_first_step import best_lr, first_ratio, lowest, without


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
    # The layers' sums are added, and a weight that only full fine-tuning trains raises the ratio.
    gradients, factors = {"even": even, "few": few, "norm": few}, {"even": a, "few": a}
    assert expected / 2 < first_ratio(total + float(few.abs().sum()), gradients, factors) < expected
    assert first_ratio(2 * total, {"even": even}, {"even": a}) == pytest.approx(2 * expected, rel=0.05)


@pytest.mark.parametrize("start", [1e-5, 2e-3, 1.0])
def test_the_walk_finds_the_lowest_loss_from_either_side(start: float):
    seen = []

    def loss(lr: float) -> float:
        seen.append(lr)
        return math.log(lr / 3e-3) ** 2

    assert best_lr(loss, start) == pytest.approx(3e-3)
    assert len(seen) == len(set(seen))


def test_a_lowest_loss_at_an_edge_is_none():
    # A step that raises the loss at any LR ends the walk too.
    assert math.isnan(best_lr(lambda lr: lr, 1e-4))
    assert math.isnan(lowest({1.0: 0.0, 2.0: 1.0, 4.0: 2.0}))
    assert lowest({4.0: 1.0, 1.0: 1.0, 2.0: 0.0}) == pytest.approx(2)


def test_a_without_the_mean_input_does_not_see_it():
    mean, a = torch.randn(8), torch.randn(3, 8)
    changed = without(a, mean)
    assert changed @ mean == pytest.approx(0, abs=1e-5)
    other = torch.randn(8)
    other -= mean * (other @ mean) / (mean @ mean)
    assert torch.allclose(changed @ other, a @ other, atol=1e-5)
