"""Batches of SFT: the data order, micro-batches with little padding, and tensors with the scored next-token targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorabench.data.tokens import TokenizedSplit

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Target of a position whose next token is not scored."""

PASS_TOKENS = {"cpu": 128, "cuda": 2048}
"""Fixed cost of a pass through the model (launching kernels, reading weights) by device type, in tokens' worth of time.

The CPU's value was slightly better than 32 and 64 on the laptop preset's batches; the GPU's is assumed.
"""


def data_order(n_examples: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Return the example indices of every step, (steps, batch_size), with a new shuffle for each epoch.

    The order depends on the seed alone, so all conditions with one seed see the same batches in the same order.
    """
    epochs = -(-steps * batch_size // n_examples)
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(n_examples) for _ in range(epochs)])
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


def micro_batches(lengths: np.ndarray, max_tokens: int, pass_tokens: int) -> list[np.ndarray]:
    """Split a batch by length into the micro-batches of least cost that fit `max_tokens`, by dynamic programming.

    Each example is in exactly one micro-batch: with losses that are summed over tokens the gradient is that of the
    whole batch. A micro-batch costs its rows times its longest row, plus `pass_tokens`.

    Args:
        lengths: tokens of each example of the batch, (examples,).
        max_tokens: limit of rows times longest row of a micro-batch; a single example always fits.
        pass_tokens: fixed cost of a pass through the model, in tokens (see `PASS_TOKENS`).

    Returns:
        The positions within the batch of each micro-batch's examples, short examples first.
    """
    order = np.argsort(lengths, kind="stable")
    costs, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
    for end, longest in enumerate(lengths[order].tolist(), 1):
        first = min(end - 1, max(0, end - max_tokens // max(1, longest)))
        candidates = costs[first:end] + np.arange(end - first, 0, -1) * longest
        best = int(candidates.argmin())
        costs[end], starts[end] = candidates[best] + pass_tokens, first + best
    parts, end = [], len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = int(starts[end])
    return parts[::-1]


class Batch(NamedTuple):
    """The inputs of a model and their next-token targets, each tensor (rows, width), padded on the right.

    Targets are `IGNORED` where the next token is not scored. No attention mask is needed: attention is causal and
    padding comes last, so no scored position attends to padding.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    @property
    def scored(self) -> int:
        """The number of scored targets."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; the copy to a GPU is asynchronous."""
        if device.type == "cuda":
            return Batch(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in self))
        return Batch(*(tensor.to(device) for tensor in self))


def collate(split: TokenizedSplit, examples: Sequence[int] | np.ndarray) -> Batch:
    """Build a batch of examples, given by index; no examples give one token without a target."""
    import torch

    tokens = [split.example(int(index)) for index in examples]
    # An example's last token is only a target.
    shape = max(1, len(tokens)), max([1, *(len(ids) - 1 for ids, _ in tokens)])
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for row, (ids, scored) in enumerate(tokens):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(scored[1:], ids[1:], IGNORED)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def scored_by_example(split: TokenizedSplit) -> np.ndarray:
    """Count the scored next tokens of each example, (examples,); an example's first token is never predicted."""
    before = np.concatenate([[0], np.cumsum(split.scored)])
    counts: np.ndarray = before[split.offsets[1:]] - before[split.offsets[:-1]] - split.scored[split.offsets[:-1]]
    return counts
