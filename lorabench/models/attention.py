"""Causal attention on a CPU, by matrix products over blocks of queries.

PyTorch's kernel for CPUs keeps only the result, and recomputes the scores, in small tiles, for the backward pass. Here
the scores of a block of queries are one large product with the keys up to the block's end, and the probabilities are
kept. `lorabench.models.specs.blocks_pay` says for which rows this is faster. In bf16 the scores are rounded before they
are exponentiated, as in the eager attention of transformers.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorabench.models.specs import blocks, blocks_pay

NAME = "lorabench_blocks"
"""The name of this attention in transformers."""


def attend_in_blocks(model: PreTrainedModel) -> None:
    """Make a model that uses PyTorch's attention compute it in blocks, where the result is the same.

    PyTorch still computes it with masks or caches, on GPUs, in long rows, and where a model replaces the functions of
    transformers.
    """
    functions = getattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", None)
    if functions is not modeling_utils.ALL_ATTENTION_FUNCTIONS or model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return softmax(scaling q k' + causal mask) v, (rows, length, heads, width of the values).

    Queries are (rows, heads, length, width), keys (rows, key heads, length, width) and values (rows, key heads, length,
    width of the values); each key head serves heads / key heads adjacent query heads.
    """
    result: Tensor = _Blocks.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
    return result.transpose(1, 2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: in blocks where possible and faster, else by PyTorch."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = dropout or any(others.get(name) is not None for name in ("position_bias", "softcap", "output_attentions"))
    plain = causal and attention_mask is None and not special and query.shape[2] == key.shape[2]
    # Where PyTorch's fused kernels are turned off, to count FLOPs, this one must be off too.
    if plain and query.device.type == "cpu" and torch.backends.cuda.flash_sdp_enabled():
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if blocks_pay(query.shape[2], query.dtype == torch.bfloat16):
            return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
    )
    return output


def _stacked(tensor: Tensor, groups: int, block: slice) -> Tensor:
    """Return a block as (rows x groups, heads of a group x length, width): heads that share keys share a product."""
    heads: Tensor = tensor.unflatten(1, (groups, -1))
    return heads[..., block, :].flatten(2, 3).flatten(0, 1)


def _put(to: Tensor, groups: int, block: slice, stacked: Tensor) -> None:
    """Write a block in the form of `_stacked` into a tensor (rows, heads, length, width)."""
    part = to.unflatten(1, (groups, -1))[..., block, :]
    part.copy_(stacked.view(part.shape))


class _Blocks(torch.autograd.Function):
    """Computes `causal_attention`; the result is its transposed view, (rows, heads, length, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows, heads, length, _ = query.shape
        groups = key.shape[1]
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        result = value.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        kept = []
        for block in blocks(length):
            queries = _stacked(query, groups, block)
            unseen = queries.new_full((block.stop - block.start, block.stop), -math.inf).triu_(block.start + 1)
            scores = torch.baddbmm(unseen.repeat(heads // groups, 1), queries, keys[:, : block.stop].mT, alpha=scaling)
            shares = torch.softmax(scores, -1)
            _put(result, groups, block, shares @ values[:, : block.stop])
            kept += [queries, shares]
        ctx.save_for_backward(keys, values, *kept)
        ctx.scaling, ctx.groups = scaling, groups
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, *kept = ctx.saved_tensors
        [gradient], groups = gradients, ctx.groups
        rows, heads, length, _ = gradient.shape
        to_query = gradient.new_empty(rows, length, heads, keys.shape[-1]).transpose(1, 2)
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for block, queries, shares in zip(blocks(length), kept[::2], kept[1::2], strict=True):
            to_result = _stacked(gradient, groups, block)
            to_shares = to_result @ values[:, : block.stop].mT
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            _put(to_query, groups, block, (to_scores @ keys[:, : block.stop]).mul_(ctx.scaling))
            to_keys[:, : block.stop].add_(to_scores.mT @ queries, alpha=ctx.scaling)
            to_values[:, : block.stop].add_(shares.mT @ to_result)
        return to_query, to_keys.unflatten(0, (rows, groups)), to_values.unflatten(0, (rows, groups)), None
