"""The catalogue of claims: the claims of all modules in the order in which they are shown, and the core claims."""

from __future__ import annotations

from lorabench.claims import (
    batch_size,
    capacity,
    compute,
    early_curves,
    invariance,
    learning_curves,
    learning_rate,
    lr_across_models,
    lr_law,
    lr_ratio_theories,
    parameter_counts,
    parametrization,
    placement,
    reinforcement,
    rl_information,
    rl_progress,
    stored_bits,
)
from lorabench.claims.claim import Claim

_MODULES = (
    learning_curves,
    capacity,
    stored_bits,
    learning_rate,
    lr_across_models,
    lr_law,
    lr_ratio_theories,
    early_curves,
    parametrization,
    invariance,
    batch_size,
    placement,
    parameter_counts,
    reinforcement,
    rl_progress,
    rl_information,
    compute,
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
