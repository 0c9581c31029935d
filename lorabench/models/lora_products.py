"""The products of LoRA on a frozen linear layer, computed faster than by PEFT's own forward pass.

PEFT adds the adapter and saves it; this module replaces the forward pass of its linear layers. The products with A and
B are added to the base's result in place, and the backward pass is explicit, so that no product of the size of the
activations is kept or scaled. Where the rank is large for the layer, merging A and B into the weights takes fewer
FLOPs. With autocast the frozen weights are cast once, not in every pass.

Fused experts (all experts of a layer in one parameter) and sharded models keep PEFT's own forward pass.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabench.models.dimensions import merging_is_cheaper
from lorabench.models.lora import lora_layers


def use_fast_products(model: nn.Module, keep_cast: bool = True) -> None:
    """Replace the forward pass of a model's LoRA layers; `model.unload()` returns the base as it was.

    Args:
        model: a model with the adapter `default`.
        keep_cast: whether to keep, with autocast, the cast frozen weights, which take half the memory of the base.
            Otherwise they are cast in every pass with gradients, and kept until the backward pass or, where activations
            are recomputed, only while a layer is computed; passes without gradients keep them until the next with.
    """
    from peft.tuners.lora import Linear

    for _, layer in lora_layers(model):
        if isinstance(layer, Linear):
            layer.keep_cast, layer.cast = keep_cast, None
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Compute a linear layer with LoRA, (rows, ..., d_in) to (rows, ..., d_out)."""
    base: nn.Linear = layer.base_layer
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast = layer.cast
        if cast is None or cast[0].dtype != dtype:
            cast = (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        # Passes without gradients are many, and keep nothing else.
        layer.cast = cast if layer.keep_cast or not torch.is_grad_enabled() else None
        weight, bias = cast
        x = x.to(dtype)
    flat = x.reshape(-1, x.shape[-1])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = _merging_pays(x.dtype, len(flat), x.shape[-1], len(weight), len(a))
    product = _Merged if merged else _Added
    y: Tensor = product.apply(flat, weight, bias, a, b, layer.scaling["default"])  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def _merging_pays(dtype: torch.dtype, tokens: int, d_in: int, d_out: int, rank: int) -> bool:
    """Return whether merged weights take fewer multiplications.

    Merging in both passes, and computing the gradients of A and B from that of the weights, take 4 r d_in d_out. Only
    fp32 is merged: in 16 bits small updates of W would be lost to rounding.
    """
    if dtype != torch.float32 or not merging_is_cheaper(rank, d_in, d_out):
        return False
    return tokens * (3 * rank * (d_in + d_out) - d_in * d_out) > 4 * rank * d_in * d_out


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """Return the product (tokens, r) of (tokens, d) and (d, r).

    In fp32 a CPU takes up to five times as long for few columns as for few rows, at ranks below 16.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and factor.shape[1] < 16:
        return (factor.t() @ x.t()).t()
    return x @ factor


class _Added(torch.autograd.Function):
    """Computes x W' + scaling (x A') B' for x (tokens, d_in), W (d_out, d_in), A (r, d_in) and B (d_out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        inner = _narrow(x, a.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return y.addmm_(inner, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        g = gradients[0].contiguous()
        to_inner = _narrow(g, b).mul_(ctx.scaling)
        to_x = (g @ weight).addmm_(to_inner, a) if ctx.needs_input_grad[0] else None
        # Without transposing the result of the gradient of B a CPU takes up to seven times as long.
        return to_x, None, None, (to_inner.t() @ x).float(), (inner.t() @ g).t().float(), None


class _Merged(torch.autograd.Function):
    """Computes the same as `_Added` in fp32, with W + scaling B A (merged again in both passes) and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        y = x @ torch.addmm(weight, b, a, alpha=scaling).t()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g, scaling = gradients[0].contiguous(), ctx.scaling
        to_x = g @ torch.addmm(weight, b, a, alpha=scaling) if ctx.needs_input_grad[0] else None
        to_weight = g.t() @ x
        return to_x, None, None, scaling * (b.t() @ to_weight), scaling * (to_weight @ a.t()), None
