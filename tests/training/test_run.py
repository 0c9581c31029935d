"""The norm of a lane's gradient, and clipping to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorabench.models.lanes.shelf import Lane, WeightSlot
from lorabench.training.run import clip_gradient


def lane_of(*sizes):
    """Return a lane of weights with random gradients, some long in one dimension, and one weight without a gradient."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (*sizes, 3)]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter)
    return Lane({str(n): WeightSlot(parameter, parameter.shape) for n, parameter in enumerate(parameters)})


def exact(lane):
    return sum(float(p.grad.double().square().sum()) for p in lane.parameters if p.grad is not None) ** 0.5


@pytest.mark.parametrize("sizes", [[5], [(3, 4), 70_000], [(2000, 1500), 6_000_000]])
def test_the_norm_is_exact_however_long_a_tensor(sizes):
    lane = lane_of(*sizes)
    before = [p.grad.clone() for p in lane.parameters[:-1]]
    assert clip_gradient(lane, None) == pytest.approx(exact(lane), rel=1e-6)
    assert all(torch.equal(p.grad, old) for p, old in zip(lane.parameters, before, strict=False))


def test_a_gradient_is_scaled_to_the_limit_and_never_up():
    lane = lane_of((30, 40))
    norm = exact(lane)
    direction = lane.parameters[0].grad / norm
    assert clip_gradient(lane, 2 * norm) == pytest.approx(norm, rel=1e-6)
    assert exact(lane) == pytest.approx(norm, rel=1e-6)
    assert clip_gradient(lane, 0.5) == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(lane.parameters[0].grad, 0.5 * direction, rtol=1e-5, atol=0)


def test_without_any_gradient_the_norm_is_zero():
    assert clip_gradient(lane_of(), 1.0) == 0.0
