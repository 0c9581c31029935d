"""Tests of lorabench.claims: claims judged on tables whose answer is known."""

import zlib

import numpy as np
import pandas as pd

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.store.tables import Tables


def judged(ids, runs=None, curves=None, compute=None, counts=None, test_losses=None, **options):
    """Judge claims on tables; return the row of one claim, or the table by id of several."""
    given = [pd.DataFrame() if table is None else table for table in (runs, curves, compute, counts, None, test_losses)]
    chosen = [claim for claim in CLAIMS if claim.id in ([ids] if isinstance(ids, str) else ids)]
    table = judge_claims(Tables(*given), chosen, **options).set_index("claim_id")
    return table.loc[ids] if isinstance(ids, str) else table


def jitter(key, size=1.0):
    """Return normal noise that depends on the key alone."""
    return size * np.random.default_rng(zlib.crc32(key.encode())).standard_normal()


def verdict_is(row, verdict, *parts):
    """Assert a verdict, that its reason has some parts, and that no number of the reason is unknown."""
    assert row["verdict"] == verdict, row["reason"]
    for part in parts:
        assert part in row["reason"]
    assert "nan" not in row["reason"]
