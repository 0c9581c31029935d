"""The catalogue of claims: the claims of all modules in the order in which they are shown, and the core claims."""

from __future__ import annotations

from lorabench.claims import (
    across_models,
    batch_size,
    capacity,
    compute,
    early_curves,
    invariance,
    learning_curves,
    learning_rate,
    parametrization,
    placement,
    reinforcement,
    rl_progress,
)
from lorabench.claims.claim import Claim

_MODULES = (
    *(learning_curves, early_curves, capacity, learning_rate, across_models, parametrization, invariance),
    *(batch_size, placement, reinforcement, rl_progress, compute),
)

_FAMILIES = "ANBCDEMFGP"
"""The families in the order of the table `claims`."""


def _position(claim: Claim) -> tuple[int, str, int]:
    """Return the sort key of a claim: its family, then its number; all claims on RL belong to family F."""
    family = "F" if claim.task == "rl" else claim.id[0]
    return _FAMILIES.index(family), claim.id[0], int(claim.id[1:])


CLAIMS: tuple[Claim, ...] = tuple(sorted((claim for module in _MODULES for claim in module.CLAIMS), key=_position))
"""All claims, in the order of the table `claims`."""

CORE = tuple(claim.id for claim in CLAIMS if claim.core)
"""The ids of the core claims, in the order of CLAIMS."""
