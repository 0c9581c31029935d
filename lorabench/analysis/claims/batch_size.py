"""Claims."""

from __future__ import annotations

from lorabench.analysis.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = ()
