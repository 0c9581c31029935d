"""A random-effects summary of measurements that several sources repeat.

The true value of each source is a draw from a normal distribution around a mean. The variance between sources is
estimated by the method of Paule and Mandel, the interval of the mean is that of Hartung and Knapp (t, k - 1 degrees of
freedom), and the prediction interval (t, k - 2) is where the true value of a further source would lie. statsmodels'
`combine_effects` has the first two, and a test holds them together; it has no prediction interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtrc, stdtrit

_TAIL = 0.975


@dataclass(frozen=True)
class RandomEffects:
    """The summary of the measurements of k sources."""

    mean: float
    error: float
    """Standard error of the mean."""
    low: float
    """Lower end of the 95% interval of the mean; NaN with one source."""
    high: float
    predicted_low: float
    """Lower end of the 95% prediction interval of a further source; NaN with fewer than three sources."""
    predicted_high: float
    between: float
    """Standard deviation of the true values between sources."""
    share: float
    """I squared: the share of the variation that is not the sources' own error, from 0 to 1."""
    p_alike: float
    """The probability of so much variation if all sources had one true value (Cochran's Q)."""
    k: int
    """The number of sources."""


def random_effects(values: Sequence[float], errors: Sequence[float]) -> RandomEffects:
    """Summarize the measurements of several sources.

    Args:
        values: a value for each source.
        errors: their standard errors, all above 0.

    Raises:
        ValueError: there is no source, or an error is not above 0.
    """
    value, variance = np.asarray(values, float), np.asarray(errors, float) ** 2
    k = len(value)
    if not k or not (np.isfinite(value).all() and (variance > 0).all()):
        raise ValueError("every source needs a number and an error above 0")
    between = _between(value, variance)
    weights = 1 / (variance + between)
    mean = float((weights * value).sum() / weights.sum())
    fixed = 1 / variance
    q = float((fixed * (value - (fixed * value).sum() / fixed.sum()) ** 2).sum())
    if k == 1:
        nan = math.nan
        return RandomEffects(mean, math.sqrt(variance[0]), nan, nan, nan, nan, nan, nan, nan, 1)
    # The interval must not be shorter than without variation between sources: the factor is at least 1.
    scale = max(1.0, float((weights * (value - mean) ** 2).sum()) / (k - 1))
    error = math.sqrt(scale / weights.sum())
    half = float(stdtrit(k - 1, _TAIL)) * error
    spread = float(stdtrit(k - 2, _TAIL)) * math.sqrt(between + error**2) if k > 2 else math.nan
    return RandomEffects(
        mean,
        error,
        mean - half,
        mean + half,
        mean - spread,
        mean + spread,
        math.sqrt(between),
        max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0,
        float(chdtrc(k - 1, q)),
        k,
    )


def p_of_groups(summaries: Sequence[RandomEffects]) -> float:
    """Return the probability of means of groups so far apart if all groups had one mean (a Wald test)."""
    fixed = random_effects([part.mean for part in summaries], [part.error for part in summaries])
    return fixed.p_alike


def _between(value: np.ndarray, variance: np.ndarray) -> float:
    """Return the variance between sources for which the weighted sum of squares is its expectation, k - 1."""
    if len(value) < 2:
        return 0.0

    def excess(between: float) -> float:
        weights = 1 / (variance + between)
        mean = (weights * value).sum() / weights.sum()
        return float((weights * (value - mean) ** 2).sum()) - (len(value) - 1)

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, float(value.var(ddof=1)) + float(variance.max())
    while excess(high) > 0:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high
