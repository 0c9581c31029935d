"""LoRA of several lanes (runs that share a model) on one frozen base, computed faster than one after the other.

PEFT adds the adapters, one for each lane, and saves them; this module replaces the forward pass of its linear layers.
The base's product is computed for the rows of all lanes at once. A and B of all lanes are stacked, and their products
are added to the result in place; the backward pass is explicit, so that no product of the size of the activations is
kept or scaled. Where the rank is large for the layer, merging A and B into the weights takes fewer FLOPs. With autocast
the frozen weights are cast once, not in every pass.

Fused experts (all experts of a layer in one parameter) are computed by PEFT's own forward pass, with a single lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabench.models.dimensions import merging_is_cheaper
from lorabench.models.lanes.shelf import (
    Lane,
    RowCounts,
    Shelf,
    Stack,
    add_products,
    by_lane,
    have_equal_tokens,
    lane_name,
)
from lorabench.models.lora import adapter_pairs, in_expert, lora_layers

if TYPE_CHECKING:
    from peft import PeftModel


def can_stack_lora(model: PeftModel) -> bool:
    """Return whether several lanes can share the model; experts receive tokens without their rows, so they can't."""
    return not any(in_expert(name) for name, _ in lora_layers(model))


def stack_lora(model: PeftModel, names: Sequence[str], keep_cast: bool = True) -> Stack:
    """Make the adapters of a model its lanes. Its other adapters stay unused; `model.unload()` returns the base.

    Args:
        model: a model with an adapter for each lane, all of the same shapes.
        names: the adapters' names, in the order of the lanes' rows.
        keep_cast: whether to keep, with autocast, the cast frozen weights, which take half the memory of the base.
            Otherwise they are cast in every pass with gradients, and kept until the backward pass or, where activations
            are recomputed, only while a layer is computed; passes without gradients keep them until the next with.

    Raises:
        ValueError: there are several lanes on a model that they can't share (see `can_stack_lora`).
    """
    from peft.tuners.lora import Linear

    if len(names) > 1 and not can_stack_lora(model):
        raise ValueError(f"{len(names)} lanes can't share a model whose experts carry LoRA")
    starts: list[dict[str, nn.Parameter]] = []
    for adapter in names:
        weights = {name: p for name, p in model.named_parameters() if f".{adapter}." in name and ".lora_" in name}
        starts.append({lane_name(name, adapter): parameter for name, parameter in weights.items()})
    groups = [[name for name in starts[0] if (".lora_B." in name) == is_b] for is_b in (False, True)]
    shelf, rows = Shelf(starts, groups), RowCounts(len(names))
    for lane, weights in enumerate(starts):
        for name, parameter in weights.items():
            shelf.mirror(lane, name, parameter)
    modules = {id(module): name for name, module in model.named_modules()}
    for _, layer in lora_layers(model):
        # For fused experts PEFT's own forward pass reads the parameters that mirror the single lane's weights.
        if isinstance(layer, Linear):
            a, b = (shelf.leaves[f"{modules[id(layer)]}.lora_{factor}.default.weight"] for factor in "AB")
            layer.lanes = _Factors(a, b, layer.scaling[names[0]], rows, keep_cast)
            layer.forward = MethodType(_forward, layer)
    lanes = {name: Lane(shelf.places(lane), adapter_pairs(model, name)) for lane, name in enumerate(names)}
    return Stack(model, lanes, rows, shelf)


@dataclass
class _Factors:
    """The LoRA of a linear layer: A (lanes, r, d_in), B (lanes, d_out, r) and their scaling alpha/r."""

    a: Tensor
    b: Tensor
    scaling: float
    rows: RowCounts
    keep_cast: bool
    cast: tuple[Tensor, Tensor | None] | None = None
    """The frozen weight and bias in autocast's type, once they are cast."""


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Compute a linear layer, (rows, ..., d_in) to (rows, ..., d_out)."""
    factors: _Factors = layer.lanes
    base: nn.Linear = layer.base_layer
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        cast = factors.cast
        if cast is None or cast[0].dtype != dtype:
            cast = (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        # Passes without gradients are many, and keep nothing else.
        factors.cast = cast if factors.keep_cast or not torch.is_grad_enabled() else None
        weight, bias = cast
        x = x.to(dtype)
    flat = x.reshape(-1, x.shape[-1])
    counts = factors.rows.tokens(len(flat))
    merged = _merging_pays(x.dtype, len(flat) / len(counts), x.shape[-1], len(weight), factors.a.shape[1])
    product = _Merged if merged else _Added
    y: Tensor = product.apply(flat, weight, bias, factors.a, factors.b, factors.scaling, counts)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def _merging_pays(dtype: torch.dtype, tokens: float, d_in: int, d_out: int, rank: int) -> bool:
    """Return whether merged weights take fewer multiplications, given the mean number of tokens per lane.

    Merging in both passes, and computing the gradients of A and B from that of the weights, take 4 r d_in d_out. Only
    fp32 is merged: in 16 bits small updates of W would be lost to rounding.
    """
    if dtype != torch.float32 or not merging_is_cheaper(rank, d_in, d_out):
        return False
    return tokens * (3 * rank * (d_in + d_out) - d_in * d_out) > 4 * rank * d_in * d_out


def _each(counts: Sequence[int], tokens: Sequence[Tensor], stacked: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return groups of lanes to compute together: (lanes, tokens of each, width) of each tensor, and the stacked ones.

    All lanes are one group if they have the same number of tokens; otherwise each lane is a group.

    Args:
        counts: tokens of each lane.
        tokens: tensors (tokens, width).
        stacked: tensors (lanes, ...).
    """
    if have_equal_tokens(counts):
        return [(*(by_lane(tensor, counts) for tensor in tokens), *stacked)]
    parts = [[part[None] for part in tensor.split(list(counts))] for tensor in tokens]
    return list(zip(*parts, *(tensor.split(1) for tensor in stacked), strict=True))


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """Return the products (lanes, tokens, r) of (lanes, tokens, d) and (lanes, d, r).

    In fp32 a CPU takes up to five times as long for few columns as for few rows, at ranks below 16.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and factor.shape[-1] < 16:
        return torch.bmm(factor.mT, x.mT).mT
    return torch.bmm(x, factor)


def _outer(g: Tensor, inner: Tensor) -> Tensor:
    """Return the products (lanes, d, r) of the transposed (lanes, tokens, d) with (lanes, tokens, r).

    Without transposing the result a CPU takes up to seven times as long.
    """
    return torch.bmm(inner.mT, g).mT


class _Added(torch.autograd.Function):
    """Computes x W' + scaling (x A') B' with each lane's A and B.

    The shapes are x (tokens, d_in), W (d_out, d_in), A (lanes, r, d_in) and B (lanes, d_out, r); the tokens of a lane
    are contiguous. The gradients of A and B are added to `A.grad` and `B.grad` in place, on the shelf.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        counts: list[int],
    ) -> Tensor:
        ctx.gradients = a.grad, b.grad
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        inners = []
        for xs, ys, own_a, own_b in _each(counts, (x, y), (a, b)):
            inner = _narrow(xs, own_a.mT).mul_(scaling)
            ys.baddbmm_(inner, own_b.mT)
            inners.append(inner)
        ctx.save_for_backward(x, weight, a, b, *inners)
        ctx.scaling, ctx.counts = scaling, counts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, *inners = ctx.saved_tensors
        g, counts = gradients[0].contiguous(), ctx.counts
        gx = g @ weight if ctx.needs_input_grad[0] else None
        parts = _each(counts, (x, g, x if gx is None else gx), (a, b, *ctx.gradients))
        for (xs, gs, gxs, own_a, own_b, to_a, to_b), inner in zip(parts, inners, strict=True):
            ginner = _narrow(gs, own_b).mul_(ctx.scaling)
            add_products(to_a, ginner.mT, xs)
            to_b.add_(_outer(gs, inner))
            if gx is not None:
                gxs.baddbmm_(ginner, own_a)
        return gx, *(None,) * 6


class _Merged(torch.autograd.Function):
    """Computes the same as `_Added` in fp32, with W + scaling B A (merged again in both passes) and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        counts: list[int],
    ) -> Tensor:
        ctx.gradients = a.grad, b.grad
        ctx.scaling, ctx.counts = scaling, counts
        ctx.save_for_backward(x, weight, a, b)
        y = x.new_empty(len(x), len(weight))
        for xs, ys, own_a, own_b in _each(counts, (x, y), (a, b)):
            torch.bmm(xs, torch.baddbmm(weight, own_b, own_a, alpha=scaling).mT, out=ys)
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g, counts, scaling = gradients[0].contiguous(), ctx.counts, ctx.scaling
        gx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        tokens = (x, g, x if gx is None else gx)
        for xs, gs, gxs, own_a, own_b, to_a, to_b in _each(counts, tokens, (a, b, *ctx.gradients)):
            gradient = torch.bmm(gs.mT, xs)
            to_a.baddbmm_(own_b.mT, gradient, alpha=scaling)
            to_b.baddbmm_(gradient, own_a.mT, alpha=scaling)
            if gx is not None:
                torch.bmm(gs, torch.baddbmm(weight, own_b, own_a, alpha=scaling), out=gxs)
        return gx, *(None,) * 6
