"""The blocks of queries that attention on a CPU is computed in (see `lorabench.models.attention`). No torch."""

from __future__ import annotations

from itertools import pairwise

MOST = 80
"""Queries of a block. Between 48 and 128 it matters little."""
LONGEST = 512
"""Tokens of the longest rows that are computed in blocks: probabilities are kept, as the square of a row."""
_SHORT = 128


def blocks(length: int) -> list[slice]:
    """Blocks of so many queries, as large as each other."""
    count = -(-length // MOST)
    ends = [length * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def blocks_pay(length: int, bf16: bool) -> bool:
    """Whether blocks take less time than PyTorch's kernel (`python -m tests.benchmarks.parts`), and little memory.

    In fp32 that kernel is as fast in short rows.
    """
    return (1 if bf16 else _SHORT) < length <= LONGEST


def kept_shares(length: int, bf16: bool) -> float:
    """Probabilities that are kept of each query and head for the backward pass, in the mean, in rows of so many."""
    if not blocks_pay(length, bf16):
        return 0.0
    shares: int = sum((block.stop - block.start) * block.stop for block in blocks(length))
    return shares / length
