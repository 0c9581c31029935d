"""The blocks of queries in which attention is computed on a CPU (`lorabench.models.attention`); imports no torch."""

from __future__ import annotations

from itertools import pairwise

MAX_BLOCK_QUERIES = 80
"""Queries of the largest block. Values from 48 to 128 take about the same time."""
MAX_ROW_TOKENS = 512
"""Tokens of the longest rows that are computed in blocks: the memory of the probabilities grows with their square."""
_SHORT = 128


def blocks(length: int) -> list[slice]:
    """Return the blocks of a row with `length` queries, whose sizes differ by at most one."""
    count = -(-length // MAX_BLOCK_QUERIES)
    ends = [length * number // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def blocks_pay(length: int, bf16: bool) -> bool:
    """Return whether blocks take less time than PyTorch's kernel, and little memory, in rows of `length` tokens.

    Measured with `python -m benchmarks.parts`; in fp32 PyTorch's kernel is as fast in short rows.
    """
    return (1 if bf16 else _SHORT) < length <= MAX_ROW_TOKENS


def kept_shares(length: int, bf16: bool) -> float:
    """Return the mean number of attention probabilities kept per query and head for the backward pass.

    Args:
        length: tokens of a row.
        bf16: whether attention is computed in bf16, else in fp32.
    """
    if not blocks_pay(length, bf16):
        return 0.0
    shares: int = sum((block.stop - block.start) * block.stop for block in blocks(length))
    return shares / length
