"""Norms, residuals, rotary embeddings, SwiGLU and log-probabilities in one kernel each, where transformers has many.

On a GPU these take longer than the products of a small model, since each of many kernels reads and writes every
activation. `fuse` replaces the forward pass of the layers of a Llama or a dense Qwen3; passes with a cache keep all but
SwiGLU. Every function is computed in fp32 from what is read and rounded once, to the type of products. So the result
differs from that of transformers by the rounding of numbers between its kernels; and the gradients of the layers that
read a norm are added in the type of products. On a GPU `torch.compile` makes a kernel of each function, and sequences
may share a row. On a CPU nothing is fused, except where a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import accumulate
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import activate_flash_attention_impl

from lorabench.models.attention import NAME
from lorabench.models.passes import without_peft
from lorabench.models.specs import FUSED_FAMILIES


def fuse(model: Any) -> None:
    """Compute the layers of a model with fused functions, if it is of a family whose layers they are.

    From then on PyTorch computes attention by FlashAttention-4, where it is installed and written for the GPU.
    """
    from transformers import modeling_utils

    config, layers = model.config, model.get_decoder().layers
    if (
        config.model_type not in FUSED_FAMILIES
        or config.hidden_act != "silu"
        or config._attn_implementation not in ("sdpa", NAME)
        or any(getattr(layer.self_attn, "sliding_window", None) for layer in layers)
    ):
        return
    # It is written for Hopper and Blackwell, and tuned for these heads.
    if (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] in (9, 10)
        and layers[0].self_attn.head_dim in (64, 128)
    ):
        with suppress(ModuleNotFoundError):
            activate_flash_attention_impl("FA4")
    model.is_fused = True
    for layer in layers:
        layer.attend = modeling_utils.ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        layer.forward = MethodType(_layer, layer)
        layer.mlp.forward = MethodType(_mlp, layer.mlp)


def is_fused(model: nn.Module) -> bool:
    """Return whether `fuse` has changed a model, or the one that PEFT wraps."""
    return getattr(without_peft(model), "is_fused", False)


def shared_row(sequences: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> dict[str, Any]:
    """Return the arguments with which a fused model computes sequences in one row, each as if it were alone.

    Each is given by its length and those of its continuations, which follow it in the row and see it and themselves.
    """
    spans, start = [], 0
    for first, others in sequences:
        whole = torch.arange(start, start + first)
        # Attention is computed for each sequence and continuation that has tokens.
        for before, length in ((whole[:0], first), *((whole, other) for other in others if other)):
            spans.append((before, torch.arange(start, start + length)))
            start += length
    keys = torch.cat([places for span in spans for places in span]).to(device)
    sizes = [[len(own) for _, own in spans], [len(before) + len(own) for before, own in spans]]
    starts = (torch.tensor([0, *accumulate(some)], dtype=torch.int32).to(device) for some in sizes)
    return {
        "position_ids": torch.cat([torch.arange(len(own)) + len(before) for before, own in spans]).to(device)[None],
        "shared_row": (*starts, *map(max, sizes), keys if len(keys) > start else None),
        # transformers would make a mask of the whole row, unless it is given one.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
    }


def _layer(layer: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
    """Compute a decoder layer; the residual stays in the type of the weights."""
    if others.get("cache") is not None or others.get("past_key_values") is not None:
        output: Tensor = type(layer).forward(layer, hidden_states, attention_mask=attention_mask, **others)
        return output
    attention, dtype = layer.self_attn, hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    residual, normed = _AddNorm.apply(hidden_states, None, first.weight, first.variance_epsilon, dtype)  # type: ignore[no-untyped-call]
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    query, key, value = (getattr(attention, f"{name}_proj")(normed).view(shape) for name in ("q", "k", "v"))
    angles = others.pop("position_embeddings")
    query, key = (_rotated(attention, name, heads, *angles) for name, heads in (("q", query), ("k", key)))
    if row := others.pop("shared_row", None):
        # Its import takes a second.
        from torch.nn.attention.varlen import varlen_attn

        # No sequence sees another. Of more keys than queries, a query sees those up to its place from the end.
        *counts, keys = row
        heads = [tensor[0] if keys is None else tensor[0, keys] for tensor in (key, value)]
        mixed: Any = varlen_attn(
            query[0], *heads, *counts, scale=attention.scaling, window_size=(-1, 0), enable_gqa=True
        )
    else:
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        mixed = layer.attend(attention, *heads, attention_mask, scaling=attention.scaling, **others)[0]
    output = attention.o_proj(mixed.reshape(*normed.shape[:-1], -1))
    residual, normed = _AddNorm.apply(residual, output, second.weight, second.variance_epsilon, dtype)  # type: ignore[no-untyped-call]
    whole: Tensor = residual + layer.mlp(normed)
    return whole


def _rotated(attention: Any, name: str, heads: Tensor, cosine: Tensor, sine: Tensor) -> Any:
    """Return queries or keys as attention takes them; Qwen3 norms those of each head."""
    norm = getattr(attention, f"{name}_norm", None)
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
    return _Rotate.apply(heads, weight, cosine, sine, eps)  # type: ignore[no-untyped-call]


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    output: Tensor = mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-untyped-call]
    return output


def logprobs_and_entropies(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and the entropy of its distribution, which has no gradient.

    Both are (tokens,), in nats; the logits are (tokens, vocabulary).
    """
    return _Choose.apply(logits, targets[:, None])  # type: ignore[no-any-return, no-untyped-call]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Leading dimensions, and whether kernels must be deterministic, differ between calls.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Kernels are chosen without timing them, since the choice would change the order of sums from job to job.
    compiled: Callable[..., Any] = torch.compile(function, options={"deterministic": True})
    return compiled


def one_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compute a function of tensors, on a GPU in one kernel for all sizes of their first two dimensions but the last.

    There is no gradient through it.
    """
    if not arguments[0].is_cuda or isinstance(arguments[0], FakeTensor):
        return function(*arguments)
    plain = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
    for tensor in plain:
        for dimension in range(min(2, tensor.ndim - 1) if isinstance(tensor, Tensor) else 0):
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return _compiled(function)(*plain)


def _add_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    total = x if more is None else x + more
    wide = total.float()
    scale = _scale(wide, eps)
    return total, (weight * (wide * scale)).to(dtype), scale


def _add_norm_backward(
    to_normed: Tensor, to_total: Tensor, total: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    to_x = to_total + _through_norm(to_normed.float() * weight, total.float(), scale).to(to_total.dtype)
    return to_x, None if dtype is None else to_x.to(dtype)


def _through_norm(gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    normed = x * scale
    return scale * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))


def _to_weight(gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return (gradient.float() * (x.float() * scale)).flatten(0, -2).sum(0)


class _AddNorm(torch.autograd.Function):
    """Returns x + more, and its RMS norm in a type; x is (rows, length, width), and `more` may be absent."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        total, normed, scale = one_kernel(_add_norm, x, more, weight, eps, dtype)
        total = x if more is None else total
        ctx.save_for_backward(total, weight, scale)
        ctx.dtype = None if more is None else more.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (to_total, to_normed), (total, weight, scale) = gradients, ctx.saved_tensors
        to_x, to_more = one_kernel(_add_norm_backward, to_normed, to_total, total, weight, scale, ctx.dtype)
        to_weight = one_kernel(_to_weight, to_normed, total, scale) if ctx.needs_input_grad[2] else None
        return to_x, to_more, to_weight, None, None


def _rotate(x: Tensor, weight: Tensor | None, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    wide = x.float()
    if weight is not None:
        wide = weight * (wide * _scale(wide, eps))
    first, second = wide.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (wide * cosine.unsqueeze(2) + turned * sine.unsqueeze(2)).to(x.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _before_rotation(gradient: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    gradient = gradient.float()
    first, second = (gradient * sine.unsqueeze(2)).chunk(2, -1)
    return gradient * cosine.unsqueeze(2) + torch.cat((second, -first), -1)


def _rotate_backward(
    gradient: Tensor, x: Tensor | None, weight: Tensor | None, cosine: Tensor, sine: Tensor, eps: float
) -> Tensor:
    to_x = _before_rotation(gradient, cosine, sine)
    if x is not None and weight is not None:
        wide = x.float()
        to_x = _through_norm(to_x * weight, wide, _scale(wide, eps))
    return to_x.to(gradient.dtype)


def _to_head_weight(gradient: Tensor, x: Tensor, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return _to_weight(_before_rotation(gradient, cosine, sine), wide, _scale(wide, eps))


class _Rotate(torch.autograd.Function):
    """Norms heads (rows, length, heads, width), where there is a weight, and turns them by their positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(None if weight is None else x, weight, cosine, sine)
        ctx.eps = eps
        turned: Tensor = one_kernel(_rotate, x, weight, cosine, sine, eps)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient], (x, weight, *angles) = gradients, ctx.saved_tensors
        to_x = one_kernel(_rotate_backward, gradient, x, weight, *angles, ctx.eps)
        to_weight = one_kernel(_to_head_weight, gradient, x, *angles, ctx.eps) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, None, None, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (nn.functional.silu(gate.float()) * up).to(gate.dtype)


def _swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide, gate = gradient.float(), gate.float()
    share = torch.sigmoid(gate)
    to_gate = wide * up * share * (1 + gate * (1 - share))
    return to_gate.to(gradient.dtype), (wide * gate * share).to(gradient.dtype)


class _SwiGlu(torch.autograd.Function):
    """Computes silu(gate) * up, both (..., width)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        product: Tensor = one_kernel(_swiglu, gate, up)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        to_gate, to_up = one_kernel(_swiglu_backward, *gradients, *ctx.saved_tensors)
        return to_gate, to_up


def _choose(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.float()
    total = torch.logsumexp(wide, -1, keepdim=True)
    entropies = total - ((wide - total).exp() * wide).sum(-1, keepdim=True)
    return (wide.gather(-1, targets) - total).squeeze(-1), entropies.squeeze(-1), total


def _choose_backward(gradient: Tensor, logits: Tensor, targets: Tensor, total: Tensor) -> Tensor:
    hit = torch.arange(logits.shape[-1], device=logits.device) == targets
    return (gradient * (hit.float() - (logits.float() - total).exp())).to(logits.dtype)


class _Choose(torch.autograd.Function):
    """Computes `logprobs_and_entropies` for targets (tokens, 1); the entropies have no gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropies, total = one_kernel(_choose, logits, targets)
        ctx.save_for_backward(logits, targets, total)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return one_kernel(_choose_backward, gradients[0][:, None], *ctx.saved_tensors), None
