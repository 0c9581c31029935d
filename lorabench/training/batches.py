"""From token caches to tensors: the data order, micro-batches, and the scored next-token targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lorabench.data.tokens import TokenizedSplit

if TYPE_CHECKING:
    import torch

IGNORED = -100


def data_order(n_examples: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Example indices of every step, (steps, batch_size): one fresh shuffle per epoch.

    Depends on the seed alone, so all arms of one seed see the same batches in the same order.
    """
    epochs = -(-steps * batch_size // n_examples)
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(n_examples) for _ in range(epochs)])
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


def micro_batches(lengths: np.ndarray, max_tokens: int, groups: int = 1) -> Iterator[np.ndarray]:
    """Split a batch, by length, into parts of little padding that fit `max_tokens`.

    The parts together are the batch: with token-summed losses the gradient is the same, only less
    padding is computed.

    Args:
        lengths: tokens of each example of the batch, (n,).
        max_tokens: limit of examples times longest length in a part; one example always fits.
        groups: split into at least this many parts (as far as there are examples).

    Yields:
        Positions within the batch, each exactly once.
    """
    by_length = np.argsort(lengths, kind="stable")
    cap = max(1, -(-len(lengths) // groups))
    start = 0
    while start < len(by_length):
        end = start + 1
        while end < len(by_length) and end - start < cap:
            if (end + 1 - start) * lengths[by_length[end]] > max_tokens:
                break
            end += 1
        yield by_length[start:end]
        start = end


def collate(split: TokenizedSplit, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token targets of some examples, both (n, longest - 1), padded on the right.

    Targets are `IGNORED` where the next token is not scored. No attention mask is needed: attention is
    causal and padding comes last, so no scored position sees any. Without examples it is one token that is not scored.
    """
    import torch

    examples = [split.example(int(index)) for index in indices]
    shape = max(1, len(examples)), max((len(ids) for ids, _ in examples), default=2) - 1
    inputs = np.zeros(shape, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    for row, (ids, scored) in enumerate(examples):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(scored[1:], ids[1:], IGNORED)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def scored_tokens(split: TokenizedSplit) -> int:
    """Scored next tokens of a whole split; an example's first token is never predicted."""
    return int(split.scored.sum() - split.scored[split.offsets[:-1]].sum())
