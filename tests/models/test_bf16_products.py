"""Products in fp32 that are rounded to bf16 equal those of the processor."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from lorabench.models import bf16_products

ROUNDING = 2.0**-8
"""The largest relative error of a number that is rounded to bf16."""


@contextmanager
def using(way):
    """Compute products of bf16 matrices on the CPU this way within the context."""
    before = bf16_products.current()
    bf16_products.use(way)
    try:
        yield
    finally:
        bf16_products.use(before)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def with_buffer(product, *shape):
    """Return a function that computes into a tensor of its own, which has numbers in it already."""

    def compute():
        buffer = draw(*shape, seed=9)
        assert product(buffer) is buffer
        return buffer

    return compute


# More sums than PyTorch adds in one go, and rows that are no multiple of a register.
X, W, BIAS = draw(37, 600), draw(70, 600, seed=1), draw(70, seed=2)
XS, WS = X.view(1, 37, 600).repeat(2, 1, 1), torch.stack([W, -W])
PRODUCTS = {
    "mm": lambda: X @ W.t(),
    "mm of a slice": lambda: X[:, ::2] @ W[:, ::2].t(),
    "mm.out": with_buffer(lambda out: torch.mm(X, W.t(), out=out), 37, 70),
    "addmm": lambda: torch.addmm(BIAS, X, W.t()),
    "addmm.out": with_buffer(lambda out: torch.addmm(BIAS, X, W.t(), out=out), 37, 70),
    "addmm_": with_buffer(lambda to: to.addmm_(X, W.t(), beta=0.5, alpha=2), 37, 70),
    "bmm": lambda: torch.bmm(XS, WS.mT),
    "bmm.out": with_buffer(lambda out: torch.bmm(XS, WS.mT, out=out), 2, 37, 70),
    "baddbmm": lambda: torch.baddbmm(BIAS, XS, WS.mT, alpha=0.3),
    "baddbmm.out": with_buffer(lambda out: torch.baddbmm(BIAS, XS, WS.mT, out=out), 2, 37, 70),
    "baddbmm_": with_buffer(lambda to: to.baddbmm_(XS, WS.mT), 2, 37, 70),
    "linear": lambda: functional.linear(XS, W, BIAS),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_is_the_processors_up_to_one_rounding(product):
    results = []
    for way in ("native", "fp32"):
        with using(way):
            results.append(product())
            assert bf16_products.current() == way
    native, rounded = results
    assert rounded.dtype == native.dtype == torch.bfloat16
    assert rounded.stride() == native.stride()
    # Where the sums lie close to the middle between two numbers, their order decides which one they are rounded to.
    torch.testing.assert_close(rounded, native, rtol=2 * ROUNDING, atol=1e-4)
    assert (rounded != native).float().mean() < 0.02
    exact = X.double() @ W.double().t()
    with using("fp32"):
        torch.testing.assert_close((X @ W.t()).double(), exact, rtol=1.001 * ROUNDING, atol=1e-4)


@pytest.mark.parametrize("length", [3, 40, 600])
def test_attention_is_as_exact_as_the_processors(length):
    def output_and_gradients(dtype):
        inputs = [draw(2, 4, length, 16, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
        output = functional.scaled_dot_product_attention(*inputs, is_causal=True)
        upstream = draw(2, 4, length, 16, seed=5).to(dtype)
        return [output, *torch.autograd.grad(output, inputs, upstream)]

    exact = output_and_gradients(torch.float64)
    with using("native"):
        native = output_and_gradients(torch.bfloat16)
    with using("fp32"):
        rounded = output_and_gradients(torch.bfloat16)
    for own, other, truth in zip(rounded, native, exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - truth).norm() <= 1.05 * (other.double() - truth).norm()
