"""From token caches to tensors: the data order, micro-batches, and the scored next-token targets.

A batch is split by length into parts of little padding. Packing removes the rest of it, at a price: attention then
needs a mask, so that fused causal kernels, which skip half of the products and hold no mask, do not apply. It is off
by default; it pays where examples are short and their lengths differ much.
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

Row = int | np.ndarray
"""An example by its number, or several that are packed."""

# What a pass costs beside its tokens, in the tokens that it could compute meanwhile: launching its kernels, reading the
# weights. On a CPU the best of 32, 64 and 128 on the laptop preset's batches, by little; of a GPU assumed.
PASS_TOKENS = {"cpu": 128, "cuda": 2048}


def data_order(n_examples: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Example indices of every step, (steps, batch_size): one fresh shuffle per epoch.

    Depends on the seed alone, so all arms of one seed see the same batches in the same order.
    """
    epochs = -(-steps * batch_size // n_examples)
    rng = np.random.default_rng(seed)
    shuffled = np.concatenate([rng.permutation(n_examples) for _ in range(epochs)])
    return shuffled[: steps * batch_size].reshape(steps, batch_size)


def micro_batches(
    lengths: Sequence[np.ndarray], max_tokens: int, pass_tokens: int, packing: bool = False
) -> Iterator[tuple[np.ndarray | list[np.ndarray], ...]]:
    """Split the batches of lanes, by length, into parts that cost little and fit `max_tokens`; a part of each at once.

    The parts together are the batch: with token-summed losses the gradient is the same, only less
    padding is computed. Where lanes have as many examples each, so have their parts.

    Args:
        lengths: tokens of each example of a lane's batch, (examples,), for each lane.
        max_tokens: limit of rows times longest length in a part of all lanes; one example always fits.
        pass_tokens: what a pass through the model costs beside its tokens, in tokens (see `PASS_TOKENS`).
        packing: lay several examples into a row.

    Yields:
        Rows of each lane: a position within its batch, or those of several packed examples; each position exactly once.
    """
    lanes = len(lengths)
    most, each = max_tokens // lanes, pass_tokens / lanes
    if packing:
        yield from zip_longest(*(_packed(own, most) for own in lengths), fillvalue=[])
        return
    orders = [np.argsort(own, kind="stable") for own in lengths]
    longest = np.max([own[order] for own, order in zip(lengths, orders, strict=True)], axis=0)
    for part in _cheapest(longest, most, each):
        yield tuple(order[part] for order in orders)


def _cheapest(lengths: np.ndarray, max_tokens: int, pass_tokens: float) -> list[slice]:
    """The cut of ascending lengths whose parts cost least: rows times longest, and a pass for each."""
    costs, starts = np.zeros(len(lengths) + 1), np.zeros(len(lengths) + 1, np.int64)
    for end, longest in enumerate(lengths.tolist(), 1):
        first = min(end - 1, max(0, end - max_tokens // max(1, longest)))
        found = costs[first:end] + np.arange(end - first, 0, -1) * longest
        best = int(found.argmin())
        costs[end], starts[end] = found[best] + pass_tokens, first + best
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
    at_once = max(1, max_tokens // int(lengths.max()))
    for start in range(0, len(rows), at_once):
        yield [np.array(row) for row in rows[start : start + at_once]]


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

    def scored_by(self, lanes: int) -> np.ndarray:
        """Scored targets of each lane, (lanes,): so many have as many rows each, one after another."""
        counts: np.ndarray = (self.targets != IGNORED).view(lanes, -1).sum(1).cpu().numpy()
        return counts

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device. A GPU fetches it on its own while this process goes on."""
        import torch

        if torch.device(device).type == "cuda":
            return Batch(*(None if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))  # type: ignore[arg-type]
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


def collate(split: TokenizedSplit, rows: Iterable[Row]) -> Batch:
    """Some examples, one to a row or several, end to end. Without any it is one token that is not scored."""
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
            # Through the end of the row: padding counts on.
            positions[number, start:] = np.arange(shape[1] - start)
            start = end
    packed = any(len(row) > 1 for row in examples)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions) if packed else None)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one shape, one batch after another."""
    import torch

    if len(batches) == 1:
        return batches[0]
    inputs, targets, positions = zip(*batches, strict=True)
    packed = positions[0] is not None
    return Batch(torch.cat(inputs), torch.cat(targets), torch.cat(positions) if packed else None)


def scored_tokens(split: TokenizedSplit) -> int:
    """Scored next tokens of a whole split; an example's first token is never predicted."""
    return int(split.scored.sum() - split.scored[split.offsets[:-1]].sum())
