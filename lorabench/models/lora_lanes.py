"""LoRA of several lanes on one frozen base, computed faster than layer by layer.

PEFT puts the adapters on, one for each lane, and saves them; here its linear layers get another forward pass. The base
is computed for the rows of all lanes as one product. A and B of all lanes are stacked, and added to the result in
place; the backward pass is written out, so that no product of the size of the activations is kept or scaled. Where the
rank is large for the layer, fewer products are needed with A and B merged into the weights. With autocast the frozen
weights are cast once, not in every pass.

Experts that a model keeps in one parameter have LoRA through PEFT's own forward pass; then there is one lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabench.models.dimensions import merges
from lorabench.models.lanes import Lane, Rows, Shelf, Stack, add_products, by_lane, even, lane_name
from lorabench.models.lora import adapter_pairs, in_expert, lora_layers

if TYPE_CHECKING:
    from peft import PeftModel


def can_share(model: PeftModel) -> bool:
    """Whether rows of several lanes can go through the model: experts see tokens without their rows."""
    return not any(in_expert(name) for name, _ in lora_layers(model))


def stack_lora(model: PeftModel, names: Sequence[str], keep_cast: bool = True) -> Stack:
    """The lanes of a model that has an adapter of each of these names, of the same shapes; all adapters but these go on
    lying idle. `model.unload()` gives the base back.

    Args:
        keep_cast: with autocast, keep the frozen weights in its type too, half the memory of the base once more.
            Without, they are cast in every pass, and kept until the backward pass or, where activations are computed
            again, no longer than a layer takes.

    Raises:
        ValueError: several lanes on a model that can't share (see `can_share`).
    """
    from peft.tuners.lora import Linear

    if len(names) > 1 and not can_share(model):
        raise ValueError(f"{len(names)} lanes on a model whose experts carry LoRA")
    starts: list[dict[str, nn.Parameter]] = []
    for adapter in names:
        weights = {name: p for name, p in model.named_parameters() if f".{adapter}." in name and ".lora_" in name}
        starts.append({lane_name(name, adapter): parameter for name, parameter in weights.items()})
    groups = [[name for name in starts[0] if (".lora_B." in name) == is_b] for is_b in (False, True)]
    shelf, rows = Shelf(starts, groups), Rows(len(names))
    for lane, weights in enumerate(starts):
        for name, parameter in weights.items():
            shelf.mirror(lane, name, parameter)
    modules = {id(module): name for name, module in model.named_modules()}
    for _, layer in lora_layers(model):
        # Where experts are one parameter PEFT's own forward pass reads the one lane's mirrors.
        if isinstance(layer, Linear):
            a, b = (shelf.leaves[f"{modules[id(layer)]}.lora_{factor}.default.weight"] for factor in "AB")
            layer.lanes = _Factors(a, b, layer.scaling[names[0]], rows, keep_cast)
            layer.forward = MethodType(_forward, layer)
    lanes = {name: Lane(shelf.places(lane), adapter_pairs(model, name)) for lane, name in enumerate(names)}
    return Stack(model, lanes, rows, shelf)


@dataclass
class _Factors:
    """What a linear layer adds to its frozen product: A (lanes, r, d_in), B (lanes, d_out, r) and their scaling."""

    a: Tensor
    b: Tensor
    scaling: float
    rows: Rows
    keep_cast: bool
    cast: tuple[Tensor, Tensor | None] | None = None
    """The frozen weight and bias in autocast's type, once made."""


def _forward(layer: Any, x: Tensor) -> Tensor:
    """The forward pass of a linear layer, (rows, ..., d_in) to (rows, ..., d_out)."""
    own: _Factors = layer.lanes
    base: nn.Linear = layer.base_layer
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        cast = own.cast
        if cast is None or cast[0].dtype != dtype:
            cast = (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        own.cast = cast if own.keep_cast else None
        weight, bias = cast
        x = x.to(dtype)
    flat = x.reshape(-1, x.shape[-1])
    counts = own.rows.tokens(len(flat))
    merged = _merging_pays(x.dtype, len(flat) / len(counts), x.shape[-1], len(weight), own.a.shape[1])
    product = _Merged if merged else _Added
    y: Tensor = product.apply(flat, weight, bias, own.a, own.b, own.scaling, counts)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])


def _merging_pays(dtype: torch.dtype, tokens: float, d_in: int, d_out: int, rank: int) -> bool:
    """Whether merged weights cost fewer products, if each lane has so many tokens.

    Merging twice, and the gradients of A and B from that of the weights, are 4 r d_in d_out. In 16 bits small updates
    of W would be rounded away.
    """
    if dtype != torch.float32 or not merges(rank, d_in, d_out):
        return False
    return tokens * (3 * rank * (d_in + d_out) - d_in * d_out) > 4 * rank * d_in * d_out


def _each(counts: Sequence[int], tokens: Sequence[Tensor], stacked: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Tokens (tokens, width) as (lanes, tokens of each, width), and what is stacked by lane.

    All lanes at once, or each by itself where they have different numbers of tokens.
    """
    if even(counts):
        return [(*(by_lane(tensor, counts) for tensor in tokens), *stacked)]
    parts = [[part[None] for part in tensor.split(list(counts))] for tensor in tokens]
    return list(zip(*parts, *(tensor.split(1) for tensor in stacked), strict=True))


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """Products of (lanes, tokens, d) and (lanes, d, r), (lanes, tokens, r).

    In fp32 a CPU takes up to five times as long for few columns as for few rows, at ranks below 16.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and factor.shape[-1] < 16:
        return torch.bmm(factor.mT, x.mT).mT
    return torch.bmm(x, factor)


def _outer(g: Tensor, inner: Tensor) -> Tensor:
    """Products of (lanes, tokens, d) and (lanes, tokens, r), (lanes, d, r).

    The other way round a CPU takes up to seven times as long.
    """
    return torch.bmm(inner.mT, g).mT


class _Added(torch.autograd.Function):
    """x W' + scaling (x A') B' with each lane's A and B.

    x (tokens, d_in), W (d_out, d_in), A (lanes, r, d_in), B (lanes, d_out, r); the tokens of a lane lie side by side.
    The gradients of A and B are added to `A.grad` and `B.grad` where these lie, on the shelf.
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
    """As `_Added`, in fp32, by W + scaling B A, which is made anew in both passes, and by its gradient."""

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
