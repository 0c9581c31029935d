"""A KV cache with spare room: concatenating keys and values for every new token would copy all earlier tokens.

With autocast it holds the type of the products, to which attention would convert all keys and values for every token.
"""

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
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
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

    def join(self, kept: Tensor, others: _GrowingLayer, chosen: Tensor, order: Tensor, width: int) -> None:
        """Keep some rows, and add rows of another cache; the last columns of both become the last of `width`.

        Args:
            kept: indices of the rows that are kept.
            others: the same layer of the other cache.
            chosen: indices of its rows that are added.
            order: the rows kept, then those added, in their new order.
            width: the number of columns; columns before the first of a row are zero.
        """
        joined = []
        for own, other in ((self.keys, others.keys), (self.values, others.values)):
            buffer = own.new_zeros((len(order), *own.shape[1:-2], width + _ROOM, own.shape[-1]))
            place = order.argsort()
            for source, rows, to in ((own, kept, place[: len(kept)]), (other, chosen, place[len(kept) :])):
                columns = min(width, source.shape[-2])
                buffer[to, :, width - columns : width] = source[rows, :, source.shape[-2] - columns :]
            joined.append(buffer)
        self.buffers = (joined[0], joined[1])
        self.keys, self.values = (buffer[..., :width, :] for buffer in self.buffers)


def join(cache: Cache, kept: Tensor, others: Cache, chosen: Tensor, order: Tensor, width: int) -> None:
    """Keep some rows of a cache and add rows of another, layer by layer; see `_GrowingLayer.join`."""
    for layer, other in zip(cache.layers, others.layers, strict=True):
        layer.join(kept, other, chosen, order, width)


def growing_cache() -> Cache:
    """Return an empty cache whose layers grow with spare room."""
    return Cache(layer_class_to_replicate=_GrowingLayer)
