"""Passes through a causal LM: past PEFT's wrapper, and without the last layer's MLP where its output is not read.

The last layer's output of a token that is not scored is not used: only the token's keys and values are. So the MLP, the
largest part of a layer, skips such tokens. This saves most in models of few layers, and where few tokens are scored.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


def without_peft(model: nn.Module) -> Any:
    """Return the causal LM itself, where PEFT wraps it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def computing_only(model: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Within the context, which must include the backward pass, the decoder's output is right at these tokens only.

    The tokens are distinct indices into (rows x length). All are computed in a model whose layers have no `mlp`, or
    whose `mlp` does not map a tensor (rows, length, width) to another.
    """
    layers: Any = getattr(without_peft(model).get_decoder(), "layers", None)
    mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None or not len(tokens):
        yield
        return
    forward = mlp.forward

    def at_tokens(hidden: Tensor, *others: Any, **options: Any) -> Any:
        if others or options or hidden.ndim != 3 or len(tokens) == hidden.shape[:2].numel():
            return forward(hidden, *others, **options)
        flat = hidden.flatten(0, 1)
        # Each token becomes a row of length 1, since experts expect three dimensions.
        output = forward(flat.index_select(0, tokens)[:, None])
        if not isinstance(output, Tensor):
            return forward(hidden)
        return torch.zeros_like(flat, dtype=output.dtype).index_copy(0, tokens, output.flatten(0, 1)).view_as(hidden)

    mlp.forward = at_tokens
    try:
        yield
    finally:
        mlp.forward = forward


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument of `forward` for the cache, which changed after version 5.19 of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def recompute_activations(model: Any, keeping: int = 0) -> None:
    """Keep only the inputs of all layers but the last `keeping`; the backward pass computes them again, bit for bit."""
    # There is no random state to restore: models have no dropout.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    layers = getattr(model.get_decoder(), "layers", ())
    for layer in layers[len(layers) - keeping :]:
        layer.gradient_checkpointing = False


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
