"""Layers of lanes: adding LoRA's products and merging its weights give the same results and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lorabench.models.lora_products import _Added, _Merged, _merging_pays

SCALING = 0.7
COUNTS = [[9], [5, 5, 5], [3, 0, 6]]


def layer(counts, bias, d_in=6, d_out=4, rank=5):
    """Return input, weights, bias, A and B of a layer, where A and B already have gradients."""
    generator, lanes = torch.Generator().manual_seed(0), len(counts)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight = draw(sum(counts), d_in).requires_grad_(), draw(d_out, d_in)
    a, b = (torch.nn.Parameter(draw(*shape)) for shape in ((lanes, rank, d_in), (lanes, d_out, rank)))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    return x, weight, draw(d_out) if bias else None, a, b


@pytest.mark.parametrize("product", [_Added, _Merged])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_layer_is_that_of_loras_formula_in_double_precision(product, bias, counts):
    x, weight, shift, a, b = layer(counts, bias)
    y = product.apply(x, weight, shift, a, b, SCALING, counts)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream)
    before = a.grad.clone(), b.grad.clone()

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    parts = zip(exact[0].split(counts), exact[1], exact[2], strict=True)
    expected = torch.cat([xs @ (weight.double() + SCALING * own_b @ own_a).t() for xs, own_a, own_b in parts])
    expected = expected if shift is None else expected + shift.double()
    expected.backward(upstream.double())
    assert_close(y, expected.float())
    assert_close(x.grad, exact[0].grad.float())
    # The new gradients are added to the existing ones.
    assert_close(a.grad, 1 + exact[1].grad.float())
    assert_close(b.grad, 1 + exact[2].grad.float())

    product.apply(x.detach(), weight, shift, a, b, SCALING, counts).backward(upstream)
    assert_close(a.grad, 2 * before[0] - 1)
    assert_close(b.grad, 2 * before[1] - 1)


def test_merging_is_for_ranks_that_are_large_for_the_layer_many_tokens_and_fp32():
    fp32, shape = torch.float32, (128, 128)
    # By hand: 3 r (256) - 16384 has to be above zero, so r above 21; and then t above 4 r 16384 / (768 r - 16384).
    assert not _merging_pays(fp32, 1e9, *shape, 21)
    assert _merging_pays(fp32, 1e9, *shape, 22)
    assert not _merging_pays(fp32, 128, *shape, 64)
    assert _merging_pays(fp32, 129, *shape, 64)
    assert not _merging_pays(torch.bfloat16, 1e9, *shape, 64)


def test_an_update_far_below_the_weights_counts_when_merged():
    x, weight, _, a, b = layer([500], False, d_in=64, d_out=64)
    with torch.no_grad():
        a.mul_(1e-3)
        b.mul_(1e-3)
        moved = _Merged.apply(x, weight, None, a, b, SCALING, [500]) - x @ weight.t()
        expected = SCALING * (x.double() @ a[0].t().double() @ b[0].t().double())
    # The update is a millionth of the weights.
    assert float((moved - expected).norm() / expected.norm()) < 0.3
