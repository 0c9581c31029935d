"""Student's t distribution, from `scipy.special`, since `scipy.stats` takes half a second more to import."""

from __future__ import annotations

from scipy.special import stdtrit


def t_quantile(dof: float, p: float = 0.975) -> float:
    """Return the `p` quantile of the t distribution; by default the half width of a 95% interval in standard errors."""
    return float(stdtrit(dof, p))
