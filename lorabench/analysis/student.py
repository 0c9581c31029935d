"""Student's t distribution, by scipy's special functions: `scipy.stats` takes half a second more to import."""

from __future__ import annotations

from scipy.special import stdtrit


def t_quantile(dof: float, p: float = 0.975) -> float:
    """The t that is not exceeded with probability `p`; by default half a 95% interval, in standard errors."""
    return float(stdtrit(dof, p))
