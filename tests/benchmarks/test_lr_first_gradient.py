"""The ratio of learning rates from a first gradient, on gradients whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.lr_first_gradient import first_ratio


def test_even_inputs_give_sqrt_3_width_over_alpha_and_few_large_ones_give_less():
    generator = torch.Generator().manual_seed(0)
    even = torch.randn(2000, 256, generator=generator)
    expected, total = math.sqrt(3) * 256 / 32, float(even.abs().sum())
    for rank in (4, 64):
        assert first_ratio(total, [even], rank, generator) == pytest.approx(expected, rel=0.05)
    # All of the gradient is in a quarter of the inputs.
    few = even * (torch.arange(256) < 64)
    assert first_ratio(float(few.abs().sum()), [few], 64, generator) == pytest.approx(expected / 2, rel=0.1)
    # The layers' sums are added, and a weight that only full fine-tuning trains raises the ratio.
    both = total + float(few.abs().sum())
    assert expected / 2 < first_ratio(both, [even, few], 64, generator) < expected
    assert first_ratio(2 * total, [even], 64, generator) == pytest.approx(2 * expected, rel=0.05)
