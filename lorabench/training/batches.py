"""From token caches to tensors: the data order, micro-batches, and the scored next-token targets.

A batch is split by length into parts of little padding. Packing removes the rest of it, at a price: attention then
needs a mask, so that fused causal kernels, which skip half of the products and hold no mask, do not apply. It is off
by default; it pays where examples are short and their lengths differ much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

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


def packed_rows(lengths: np.ndarray) -> list[list[int]]:
    """Examples laid end to end in rows as long as the longest example: first fit, the longest first.

    Rows as long as all of `max_tokens` would need no padding at all, but attention costs the square of a row.

    Args:
        lengths: tokens of each example, (n,).

    Returns:
        Places of the examples of each row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[place])
        row = next((row for row, left in enumerate(free) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(int(lengths.max()))
        rows[row].append(place)
        free[row] -= length
    return rows


class Batch(NamedTuple):
    """Examples as a model takes them, each tensor (rows, width), padded on the right.

    Targets are `IGNORED` where the next token is not scored. Positions restart where an example begins, which tells
    transformers to keep attention within each example; None where every row is one example. No attention mask is
    needed: attention is causal and padding comes last, so no scored position sees any.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None

    @property
    def scored(self) -> int:
        """Scored targets."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


def batches(
    split: TokenizedSplit, indices: np.ndarray, max_tokens: int, groups: int = 1, packing: bool = False
) -> Iterator[Batch]:
    """Some examples as micro-batches of at most `max_tokens`; see `micro_batches`, and with packing `packed_rows`."""
    lengths = split.lengths()[indices]
    if not packing:
        for part in micro_batches(lengths, max_tokens, groups):
            yield collate(split, indices[part])
        return
    rows = packed_rows(lengths - 1)
    at_once = max(1, max_tokens // int(lengths.max() - 1))
    for start in range(0, len(rows), at_once):
        yield collate_packed(split, [indices[row] for row in rows[start : start + at_once]])


def collate(split: TokenizedSplit, indices: np.ndarray) -> Batch:
    """Some examples, one to a row."""
    inputs, targets, _ = collate_packed(split, [np.array([index]) for index in indices])
    return Batch(inputs, targets, None)


def collate_packed(split: TokenizedSplit, rows: list[np.ndarray]) -> Batch:
    """Some examples, several to a row, end to end."""
    import torch

    examples = [[split.example(int(index)) for index in row] for row in rows]
    # An example's last token is only a target.
    shape = len(rows), max(sum(len(ids) - 1 for ids, _ in row) for row in examples)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    for number, row in enumerate(examples):
        start = 0
        for ids, scored in row:
            end = start + len(ids) - 1
            inputs[number, start:end] = ids[:-1]
            targets[number, start:end] = np.where(scored[1:], ids[1:], IGNORED)
            # Through the end of the row, so that padding goes on with the last example's.
            positions[number, start:] = np.arange(shape[1] - start)
            start = end
    return Batch(*map(torch.from_numpy, (inputs, targets, positions)))


def scored_tokens(split: TokenizedSplit) -> int:
    """Scored next tokens of a whole split; an example's first token is never predicted."""
    return int(split.scored.sum() - split.scored[split.offsets[:-1]].sum())
