"""The lattice of learning rates (LRs) on which sweeps with `lrs: auto` walk. Nothing here imports another module.

The LRs of one lattice are the same in all sweeps, so that the grids of several arms overlap. Between two neighbours
lies one finer LR, which is used where a neighbour diverged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

# An LR closer to a lattice point than this share of a step counts as that point.
_SAME = 0.3
# Neighbours are at most this many steps apart; an LR that is not on the lattice may be a little further away.
_REACH = 1.0 + _SAME + 0.03
# Half a step between a finished and a diverged run is narrow enough.
_NARROW = 0.7


@dataclass(frozen=True)
class Lattice:
    """LRs at `per_decade` points per decade, and how many of them a sweep may try beside those it starts with."""

    per_decade: int
    further: int
    """The largest number of LRs beside those with which the sweep starts."""
    scale: float = 1.0
    """A factor on all LRs, of an arm whose LR of A is scaled."""

    def lr(self, position: float) -> float:
        """Return the LR at a position: whole numbers are points of the lattice, halves lie between them."""
        return float(f"{10 ** (position / self.per_decade):.2e}") * self.scale

    def _position(self, lr: float) -> float:
        return self.per_decade * math.log10(lr / self.scale)

    def around(self, lr: float) -> tuple[float, float, float]:
        """Return the lattice point nearest to an LR, between its two neighbours."""
        nearest = round(self._position(lr * self.scale))
        low, middle, high = (self.lr(nearest + offset) for offset in (-1, 0, 1))
        return low, middle, high

    def within_reach(self, lr: float, other: float) -> bool:
        """Return whether an LR is close enough to another for a neighbour in a grid."""
        return abs(self._position(other) - self._position(lr)) <= _REACH

    def next_to(self, lr: float, side: int) -> float:
        """Return the next point of the lattice above an LR (`side` 1) or below it (-1)."""
        away = side * self._position(lr) + _SAME
        return self.lr(side * math.ceil(away))

    def between(self, lr: float, other: float) -> float | None:
        """Return the finer LR between two neighbours; None if they are less than a step apart."""
        low, high = self._position(lr), self._position(other)
        if abs(high - low) < _NARROW:
            return None
        middle = self.lr(round(low + high) / 2)
        return middle if min(lr, other) < middle < max(lr, other) else None

    def reachable(self, lowest: float, highest: float) -> Iterator[float]:
        """Yield every LR that a walk from LRs between two may come to."""
        first = math.floor(self._position(lowest)) - self.further
        last = math.ceil(self._position(highest)) + self.further
        for position in range(2 * first, 2 * last + 1):
            yield self.lr(position / 2)
