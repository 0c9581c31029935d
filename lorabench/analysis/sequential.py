"""The levels of tests that are repeated as batches of runs come in, so that all looks together keep one level.

Of a level alpha, alpha k / (k + 2) is spent in the first k looks (Lan and DeMets, 1983), so that no number of looks has
to be planned. The level of a look follows exactly for normal estimates on batches of one size, by numerical integration
over the earlier ones (docs/verdicts.md).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr

from lorabench.analysis.estimate import Estimate, standard_error

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)

_ALPHAS = np.union1d(np.geomspace(1e-9, 0.4, 60), 0.05 / np.arange(1, 9))
"""The levels between which `overall` interpolates, with those that are used most."""


def spent(alpha: float, looks: int) -> float:
    """Return what the first looks spend of a level."""
    return alpha * looks / (looks + 2)


def level(alpha: float, looks: int) -> float:
    """Return the one-sided level of the last of so many looks, all of which together have the level alpha; with no
    looks, a single test is meant."""
    return float(ndtr(-_look(alpha, looks)[0])) if looks else alpha


@lru_cache(maxsize=2**14)
def _look(alpha: float, looks: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the limit of a look in standard errors, and the sums of the batches with their probabilities where no look
    has been beyond its limit; the sum of k batches has the variance k."""
    if not looks:
        return math.inf, np.zeros(1), np.ones(1)
    _, before, masses = _look(alpha, looks - 1)
    left, scale = spent(alpha, looks) - spent(alpha, looks - 1), math.sqrt(looks)
    limit = float(brentq(lambda z: masses @ ndtr(before - z * scale) - left, 0.0, 8.0, xtol=1e-12))
    low, high = -8 * scale, limit * scale
    sums = (high - low) / 2 * _NODES + (high + low) / 2
    densities = np.exp(-((sums[:, None] - before) ** 2) / 2) @ masses / math.sqrt(2 * math.pi)
    return limit, sums, densities * _WEIGHTS * (high - low) / 2


def overall(p_values: np.ndarray, looks: int) -> np.ndarray:
    """Return the smallest levels of all looks together at which the last one rejects, given its one-sided p-values."""
    if not looks:
        return p_values
    levels = [level(float(alpha), looks) for alpha in _ALPHAS]
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(np.interp(np.log(p_values), np.log(levels), np.log(_ALPHAS), right=0.0)))


Number = tuple[str, frozenset[Hashable], int]
"""What a number of one batch has in common with that of another: the claim, the arms of its runs, and which of the
numbers about these it is."""


@dataclass
class Look:
    """The judging of claims on one batch alone, or on several together."""

    arms: Mapping[str, Hashable]
    """The arm of each run, by run_id."""
    alone: Sequence[Mapping[Number, tuple[float, int]]] = ()
    """The estimates of each batch that is judged together with others, and their numbers of seeds; none for a batch
    that is judged alone."""
    claim: str = ""
    """The claim that is judged."""
    seen: dict[Number, tuple[float, int]] = field(default_factory=dict)
    """The estimates so far."""

    def guarded(self, estimate: Estimate, run_ids: Iterable[str]) -> Estimate:
        """Return an estimate from runs with the number of looks, and with an error at least as large as between the
        batches: that of the mean of their own estimates, weighted by seeds. An exact number has no error."""
        arms = frozenset(self.arms[run_id] for run_id in run_ids if run_id in self.arms)
        place = sum(name[:2] == (self.claim, arms) for name in self.seen)
        self.seen[self.claim, arms, place] = estimate.value, max(estimate.n_seeds, 1)
        of_batches = [own[self.claim, arms, place] for own in self.alone if (self.claim, arms, place) in own]
        values, seeds = np.array([pair for pair in of_batches if math.isfinite(pair[0])]).reshape(-1, 2).T
        looked, n, error = replace(estimate, looks=len(self.alone)), len(values), standard_error(estimate.draws)
        if n < 2 or not error > 0:
            return looked
        weights = seeds / seeds.sum()
        between = math.sqrt(n / (n - 1) * float(weights**2 @ (values - weights @ values) ** 2))
        factor = max(1.0, between / error)
        by_example = None if estimate.example_part is None else factor * estimate.example_part
        return replace(looked, seed_part=factor * estimate.seed_part, example_part=by_example)


LOOK: ContextVar[Look | None] = ContextVar("LOOK", default=None)
"""The look that is judged, if it is one of several: every number that is decided passes it."""
