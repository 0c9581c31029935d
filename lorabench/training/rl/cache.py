"""A KV cache with spare room: concatenating keys and values for every new token would copy all earlier tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Tokens of spare room in a new buffer.
_ROOM = 64


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer whose `keys` and `values` are views of the filled part of longer buffers."""

    keys: Tensor
    values: Tensor
    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (batch, heads, tokens, width); return views of all tokens."""
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self.buffers is None or new > self.buffers[0].shape[-2]:
            grown = []
            for states, kept in ((key_states, self.keys), (value_states, self.values)):
                buffer = states.new_empty((*states.shape[:-2], new + _ROOM, states.shape[-1]))
                if old:
                    buffer[..., :old, :] = kept
                grown.append(buffer)
            self.buffers = (grown[0], grown[1])
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        self.is_initialized = True
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some rows of the batch, copied to new buffers with spare room."""
        length, selected = self.get_seq_length(), []
        for states in (self.keys, self.values):
            buffer = states.new_empty((len(indices), *states.shape[1:-2], length + _ROOM, states.shape[-1]))
            torch.index_select(states, 0, indices, out=buffer[..., :length, :])
            selected.append(buffer)
        self.buffers = (selected[0], selected[1])
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


def growing_cache() -> Cache:
    """Return an empty cache whose layers grow with spare room."""
    return Cache(layer_class_to_replicate=_GrowingLayer)
