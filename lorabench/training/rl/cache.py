"""Keys and values with room to grow: a cache that is joined anew for every token copies all tokens before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Tokens of room that a buffer is made with.
_ROOM = 64


class _GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """As transformers' layer, whose `keys` and `values` are here the filled part of a longer buffer."""

    keys: Tensor
    values: Tensor
    buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the states of new tokens, (batch, heads, tokens, width); returns all, as views of the buffer."""
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self.buffers is None or new > self.buffers[0].shape[-2]:
            made = []
            for states, kept in ((key_states, self.keys), (value_states, self.values)):
                buffer = states.new_empty((*states.shape[:-2], new + _ROOM, states.shape[-1]))
                if old:
                    buffer[..., :old, :] = kept
                made.append(buffer)
            self.buffers = (made[0], made[1])
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.buffers)
        self.is_initialized = True
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in a buffer of their own; the next token finds room in it."""
        length, made = self.get_seq_length(), []
        for states in (self.keys, self.values):
            buffer = states.new_empty((len(indices), *states.shape[1:-2], length + _ROOM, states.shape[-1]))
            torch.index_select(states, 0, indices, out=buffer[..., :length, :])
            made.append(buffer)
        self.buffers = (made[0], made[1])
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)


def growing_cache() -> Cache:
    """An empty cache."""
    return Cache(layer_class_to_replicate=_GrowingLayer)
