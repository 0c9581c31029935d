"""What nobody reads of the last layer is not computed.

Where a token is not scored, what the last layer makes of it goes nowhere but into its keys and values. So its MLP, most
of a layer, computes those tokens only that are read. It matters in models of few layers, and where little is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lorabench.models.lanes import Rows


def unwrapped(model: nn.Module) -> Any:
    """The causal LM itself, if PEFT is around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def read_at(model: nn.Module, tokens: Tensor, rows: Rows, counts: Sequence[int]) -> Iterator[None]:
    """Within, also in the backward pass, what the decoder gives is right at these tokens alone.

    A model whose layers have no `mlp` computes all tokens, and so does one whose `mlp` does not make a tensor of (rows,
    length, width) of one such tensor.

    Args:
        model: a causal LM.
        tokens: places in (rows x length), each once.
        rows: those of the model's lanes.
        counts: how many of the tokens are each lane's; those of a lane lie side by side.
    """
    layers: Any = getattr(unwrapped(model).get_decoder(), "layers", None)
    mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or not len(tokens):
        yield
        return
    forward = mlp.forward

    def at_tokens(hidden: Tensor, *others: Any, **options: Any) -> Any:
        if others or options or hidden.ndim != 3 or len(tokens) == hidden.shape[:2].numel():
            return forward(hidden, *others, **options)
        flat = hidden.flatten(0, 1)
        with rows.are(counts):
            # A token is a row of its own, of length 1: experts expect three dimensions.
            found = forward(flat.index_select(0, tokens)[:, None])
        if not isinstance(found, Tensor):
            return forward(hidden)
        everywhere = torch.zeros_like(flat, dtype=found.dtype)
        return everywhere.index_copy(0, tokens, found.flatten(0, 1)).view_as(hidden)

    mlp.forward = at_tokens
    try:
        yield
    finally:
        mlp.forward = forward
