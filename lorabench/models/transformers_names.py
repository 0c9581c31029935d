"""Names that transformers changed within the versions that this project runs with, 5.16 and later."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def cache_argument(model: nn.Module) -> str:
    """Return the name of the argument of a model's `forward` that takes the cache of keys and values."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def recompute_activations(model: Any) -> None:
    """Keep only the inputs of each layer; the backward pass computes the layer again, with the same result."""
    # There is no random state to restore: models have no dropout.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
