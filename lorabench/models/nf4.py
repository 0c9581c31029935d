"""Weights in 4 bits, as QLoRA holds them: NF4, the 4-bit NormalFloat, with a scale for each block of 64 numbers.

The rounded weights are held as other weights are, so that no memory is saved. In fp32, bitsandbytes trains on them with
the same results: its products are those with the rounded weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NF4 (Dettmers et al., 2023, appendix E), in units of a block's largest absolute value."""


def nf4(weight: Tensor) -> Tensor:
    """Return a weight rounded to NF4."""
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(_LEVELS, dtype=weight.dtype, device=weight.device)
    nearest = torch.bucketize(blocks / scales.clamp(min=torch.finfo(weight.dtype).tiny), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scales).flatten()[: weight.numel()].view_as(weight)


def round_to_nf4(model: PreTrainedModel) -> None:
    """Round the weights of all linear layers but the unembedding, which transformers does not quantize either."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.weight.data = nf4(module.weight.data)
