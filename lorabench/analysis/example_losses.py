"""Losses by test example: the error of a loss that comes from the choice of the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pandas as pd

from lorabench.analysis.estimate import N_DRAWS, generator


@dataclass(frozen=True)
class ExampleLosses:
    """The losses of runs by test example, from the table `test_losses`."""

    nats: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the summed loss of each example, (examples,)."""
    tokens: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """By run_id, the scored tokens of each example, (examples,)."""

    @classmethod
    def of(cls, table: pd.DataFrame) -> ExampleLosses:
        """Read the table `test_losses`: columns run_id, example, loss, tokens."""
        if table.empty:
            return cls()
        codes, run_ids = pd.factorize(table["run_id"].to_numpy(object))
        order = np.lexsort((table["example"].to_numpy(), codes))
        ends = np.cumsum(np.bincount(codes))[:-1]
        nats, tokens = (np.split(table[name].to_numpy(float)[order], ends) for name in ("loss", "tokens"))
        return cls(dict(zip(run_ids, nats, strict=True)), dict(zip(run_ids, tokens, strict=True)))

    def deviations(
        self, run_ids: Sequence[str], name: str, combined: np.ndarray | None = None
    ) -> tuple[np.ndarray, int] | None:
        """Resample the test examples (bootstrap) and compute the mean loss of each run on each resampled split.

        Args:
            run_ids: runs on one test split.
            name: names the test split; the examples of one name are resampled alike.
            combined: weights of the runs, (runs, numbers), for sums over runs in place of the runs' own losses.

        Returns:
            The difference of each mean loss from that on the split itself, (N_DRAWS, runs or numbers), and the number
            of examples. None if a run lacks its losses or the runs have different splits.
        """
        known = [run_id for run_id in run_ids if run_id in self.nats]
        if len(known) < len(run_ids) or not known:
            return None
        weights = self.tokens[known[0]]
        if any(not np.array_equal(self.tokens[run_id], weights) for run_id in known):
            return None
        losses = np.array([self.nats[run_id] for run_id in known]).T
        if combined is not None:
            losses = losses @ combined
        n = len(weights)
        mean = losses.sum(0) / weights.sum()
        # The mean is subtracted first, so that single precision suffices for the sums over each resampled split.
        numbers = np.column_stack([losses - np.outer(weights, mean), weights]).astype(np.float32)
        counts = _resampled(name, n)
        blocks = (counts[start : start + _BLOCK].astype(np.float32) @ numbers for start in range(0, N_DRAWS, _BLOCK))
        sums = np.concatenate(list(blocks)).astype(float)
        return sums[:, :-1] / np.maximum(sums[:, -1:], 1e-12), n

    def influences(self, run_ids: Sequence[str]) -> np.ndarray:
        """Return the amounts that test examples add to the runs' mean losses, times their number, (runs, examples).

        Args:
            run_ids: runs for which `deviations` is known.
        """
        weights = self.tokens[run_ids[0]]
        losses = np.array([self.nats[run_id] for run_id in run_ids])
        means = losses.sum(1, keepdims=True) / weights.sum()
        contributions: np.ndarray = (losses - means * weights) / weights.mean()
        return contributions


_BLOCK = 2**12
"""The number of draws that are made, and summed, at one time, so that they take little memory."""


@lru_cache(maxsize=16)
def _resampled(name: str, n: int) -> np.ndarray:
    """Return how often each of n examples is drawn, in one byte each, (N_DRAWS, n)."""
    random, offsets = generator(f"examples of {name}"), n * np.arange(_BLOCK)[:, None]
    counts = np.empty((N_DRAWS, n), np.uint8)
    for start in range(0, N_DRAWS, _BLOCK):
        drawn = random.integers(0, n, (_BLOCK, n)) + offsets
        counts[start : start + _BLOCK] = np.bincount(drawn.ravel(), minlength=_BLOCK * n).reshape(_BLOCK, n)
    return counts


_NEGLIGIBLE = 1e-12
"""The least share of the largest variance that a direction is taken to have, so that it can be divided by."""


def without_run_noise(
    draws: np.ndarray, influences: np.ndarray, design: np.ndarray, hat: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Remove from the error from test examples the part that the error from seeds has in it already.

    Two runs of one arm differ on single test examples by chance alone. The spread between runs, which makes the error
    from seeds, contains these differences, and resampled examples contain them, too. Only a difference that an example
    makes to all runs of an arm, or to the shape of its loss against the LR, is an error of its own. The losses of each
    example are fitted like the mean losses, and the variance of their residuals is taken from that of the coefficients.

    Args:
        draws: draws of the coefficients' error from resampled examples, (draws, coefficients).
        influences: what each example adds to each run's mean loss, times the number of examples, (runs, examples).
        design: the design matrix of the fit, (runs, coefficients).
        hat: makes coefficients from losses, (coefficients, runs).
        covariance: the covariance of runs over the variance of their noise, (runs, runs).

    Returns:
        The draws with the smaller covariance, otherwise changed as little as possible.
    """
    runs, n = influences.shape
    # A coefficient that is held near a value known before the runs takes less than a degree of freedom.
    dof = runs - float(np.trace(hat @ design))
    if dof < 1 or n < 2:
        return draws
    effects = hat @ influences
    residual = influences - design @ effects
    variance = float((residual * np.linalg.solve(covariance, residual)).sum()) / (n - 1) / dof
    unscaled = hat @ covariance @ hat.T
    total = effects @ effects.T / (n - 1)
    values, vectors = np.linalg.eigh(total)
    if not values.max() > 0:
        return draws
    scales = np.sqrt(np.maximum(values, _NEGLIGIBLE * values.max()))
    root, whitened = vectors * scales, vectors / scales
    shares, axes = np.linalg.eigh(whitened.T @ unscaled @ whitened * variance)
    shrink = (axes * np.sqrt(np.clip(1 - shares, 0.0, 1.0))) @ axes.T
    shrunk: np.ndarray = draws @ (whitened @ shrink @ root.T)
    return shrunk
