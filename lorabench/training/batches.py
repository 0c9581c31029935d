"""Batches of SFT: the data order, micro-batches, and tensors with the scored next-token targets.

A batch is split by length into micro-batches with little padding. Packing several examples into one row removes the
remaining padding, but attention then needs a mask, so that fused causal kernels, which skip half of the products and
hold no mask, cannot be used. Packing is off by default; it pays where examples are short and differ much in length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorabench.data.tokens import TokenizedSplit

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Target of a position whose next token is not scored."""

Row = int | np.ndarray
"""A row of a batch: the index of one example, or the indices of several packed examples."""

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


def micro_batches(
    lengths: Sequence[np.ndarray], max_tokens: int, pass_tokens: int, packing: bool = False
) -> Iterator[tuple[np.ndarray | list[np.ndarray], ...]]:
    """Split the batches of all lanes by length into micro-batches of the least cost that fit `max_tokens`.

    Each micro-batch has rows of every lane, and each example of a batch is in exactly one micro-batch: with losses that
    are summed over tokens the gradient is that of the whole batch, with less padding. Lanes with equally many examples
    have equally many rows in each micro-batch, unless examples are packed.

    Args:
        lengths: for each lane, the tokens of each example of its batch, (examples,).
        max_tokens: limit of rows times longest row of a micro-batch, over all lanes; a single example always fits.
        pass_tokens: fixed cost of a pass through the model, in tokens (see `PASS_TOKENS`).
        packing: lay several examples into one row.

    Yields:
        For each lane its rows: positions within its batch, or one array of positions for each row of packed examples.
    """
    lanes = len(lengths)
    lane_max_tokens, lane_pass_tokens = max_tokens // lanes, pass_tokens / lanes
    if packing:
        yield from zip_longest(*(_packed(lane_lengths, lane_max_tokens) for lane_lengths in lengths), fillvalue=[])
        return
    orders = [np.argsort(lane_lengths, kind="stable") for lane_lengths in lengths]
    longest = np.max([lane_lengths[order] for lane_lengths, order in zip(lengths, orders, strict=True)], axis=0)
    for part in _cheapest_cut(longest, lane_max_tokens, lane_pass_tokens):
        yield tuple(order[part] for order in orders)


def _cheapest_cut(lengths: np.ndarray, max_tokens: int, pass_tokens: float) -> list[slice]:
    """Cut ascending lengths into the parts of least cost, by dynamic programming.

    A part costs its rows times its longest length, plus `pass_tokens`.
    """
    costs, starts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, np.int64)
    for end, longest in enumerate(lengths.tolist(), 1):
        first = min(end - 1, max(0, end - max_tokens // max(1, longest)))
        candidates = costs[first:end] + np.arange(end - first, 0, -1) * longest
        best = int(candidates.argmin())
        costs[end], starts[end] = candidates[best] + pass_tokens, first + best
    parts, end = [], len(lengths)
    while end:
        parts.append(slice(int(starts[end]), end))
        end = parts[-1].start
    return parts[::-1]


def _packed(lengths: np.ndarray, max_tokens: int) -> Iterator[list[np.ndarray]]:
    if not len(lengths):
        return
    # An example's last token is only a target.
    rows = packed_rows(lengths - 1)
    rows_per_part = max(1, max_tokens // int(lengths.max()))
    for start in range(0, len(rows), rows_per_part):
        yield [np.array(row) for row in rows[start : start + rows_per_part]]


def packed_rows(lengths: np.ndarray) -> list[list[int]]:
    """Pack examples end to end into rows as long as the longest example, by first fit in descending length.

    Longer rows would need less padding, but the cost of attention grows with the square of a row's length.

    Args:
        lengths: tokens of each example, (n,).

    Returns:
        For each row, the indices of its examples in `lengths`.
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
    """The inputs of a model, each tensor (rows, width), padded on the right.

    Targets are `IGNORED` where the next token is not scored. Positions restart where an example begins, by which
    transformers keeps attention within each example; they are None if every row is one example. No attention mask is
    needed: attention is causal and padding comes last, so no scored position attends to padding.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None

    @property
    def scored(self) -> int:
        """The number of scored targets."""
        return int((self.targets != IGNORED).sum())

    def scored_by(self, lanes: int) -> np.ndarray:
        """Count the scored targets of each lane, (lanes,); lanes have equally many rows, lane after lane."""
        counts: np.ndarray = (self.targets != IGNORED).view(lanes, -1).sum(1).cpu().numpy()
        return counts

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device; the copy to a GPU is asynchronous."""
        import torch

        if torch.device(device).type == "cuda":
            return Batch(*(None if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


def collate(split: TokenizedSplit, rows: Iterable[Row]) -> Batch:
    """Build a batch with one example, or several packed ones, in each row; no rows give one token without a target."""
    import torch

    examples = [[split.example(int(index)) for index in np.atleast_1d(row)] for row in rows]
    # An example's last token is only a target.
    shape = max(1, len(examples)), max([1, *(sum(len(ids) - 1 for ids, _ in row) for row in examples)])
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.tile(np.arange(shape[1]), (shape[0], 1))
    for number, row in enumerate(examples):
        start = 0
        for ids, scored in row:
            end = start + len(ids) - 1
            inputs[number, start:end] = ids[:-1]
            targets[number, start:end] = np.where(scored[1:], ids[1:], IGNORED)
            # Padding continues the positions of the last example.
            positions[number, start:] = np.arange(shape[1] - start)
            start = end
    packed = any(len(row) > 1 for row in examples)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions) if packed else None)


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Concatenate the rows of batches of one shape."""
    import torch

    if len(batches) == 1:
        return batches[0]
    inputs, targets, positions = zip(*batches, strict=True)
    packed = positions[0] is not None
    return Batch(torch.cat(inputs), torch.cat(targets), torch.cat(positions) if packed else None)


def scored_by_example(split: TokenizedSplit) -> np.ndarray:
    """Count the scored next tokens of each example, (examples,); an example's first token is never predicted."""
    before = np.concatenate([[0], np.cumsum(split.scored)])
    counts: np.ndarray = before[split.offsets[1:]] - before[split.offsets[:-1]] - split.scored[split.offsets[:-1]]
    return counts


def scored_tokens(split: TokenizedSplit) -> int:
    """Count the scored next tokens of a split."""
    return int(scored_by_example(split).sum())
