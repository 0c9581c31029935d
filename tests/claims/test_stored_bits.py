"""Claim N2 on adapters that store a known number of bits."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.store.tables import Tables

from ..handmade.sft import LRS, arm, tables

PARAMS, ENTROPY, TOKENS = 1000, 40_000.0, 10_000
# Ranks 1 and 4 store about 2 bits per parameter, and the next rank stores more.
SATURATED = {None: 39_000.0, 1: 2_000.0, 4: 8_200.0, 16: 30_080.0}


def facts(bits_by_rank, growth=0.02, entropy=ENTROPY, own=0.0, **settings):
    """Make arms that store the given bits of random facts, a share `growth` of them in the second half of the steps.

    `own` is what one seed changes the loss of an arm by, the more the higher its rank.
    """
    runs, curves = tables(
        arm(
            rank,
            optimum=1e-3,
            floor=(entropy - bits) * math.log(2) / TOKENS,
            dataset="facts",
            entropy_bits=entropy,
            test_scored_tokens=TOKENS,
            trainable_params=PARAMS * (rank or 100),
            **settings,
        )
        for rank, bits in bits_by_rank.items()
    )
    shift = own * runs["seed"].map({0: 0.0, 1: 1.0, 2: -1.0}).astype(float) * runs["rank"].fillna(0).astype(float)
    runs["final_test_nll"] += shift
    final = curves["run_id"].map(runs.set_index("run_id")["final_test_nll"])
    bits = curves["run_id"].map(runs.set_index("run_id")["rank"].map(bits_by_rank).fillna(39_000.0)).astype(float)
    late = (curves["step"] < 128).astype(float) * growth * bits * math.log(2) / TOKENS
    return runs, curves.assign(value=final + late)


def judged(runs, curves):
    [claim] = [declared for declared in CLAIMS if declared.id == "N2"]
    return judge_claims(Tables(runs, curves), [claim]).iloc[0]


def test_two_bits_per_parameter_confirmed():
    row = judged(*facts(SATURATED, own=1e-4))
    assert row["verdict"] == "confirmed"
    # Of ranks 1 and 4, which the next rank outdoes, rank 4 is further from 2.
    assert row["estimate"] == pytest.approx(2.05)
    assert row["ci_low"] < 2.05 < row["ci_high"]
    assert (row["margin_low"], row["margin_high"]) == (1.5, 2.5)
    assert "r16 1.88" in row["reason"]
    assert row["n_runs"] == 3 * (len(LRS) + 2)


@pytest.mark.parametrize(
    ("bits", "settings", "verdict", "why"),
    [
        (SATURATED | {4: 3_000.0}, {}, "contradicted", "r4 is saturated at 0.75"),
        # A value above the band stays above it, however long training goes on.
        (SATURATED | {1: 4_000.0}, {"growth": 0.3}, "contradicted", "r1 is saturated at 4.00"),
        (SATURATED | {4: 3_000.0}, {"growth": 0.3}, "inconclusive", "still storing"),
        # A single rank, a next rank that stores no more, and a rank that stores all facts.
        ({1: 2_000.0, 4: 8_000.0}, {"entropy": 2_100.0}, "inconclusive", "no rank is saturated"),
        (SATURATED, {"own": 0.01}, "inconclusive", "r1 is saturated at 2.00 ["),
    ],
)
def test_otherwise(bits, settings, verdict, why):
    row = judged(*facts(bits, **({"own": 1e-4} | settings)))
    assert row["verdict"] == verdict
    assert why in row["reason"]
    assert "nan" not in row["reason"]


def test_without_curves_it_is_not_known_whether_storing_has_ended():
    runs, _ = facts(SATURATED, own=1e-4)
    row = judged(runs, pd.DataFrame())
    assert (row["verdict"], row["would_decide"]) == ("inconclusive", "more epochs")


def test_other_data_is_not_about_it():
    runs, curves = facts(SATURATED)
    assert judged(runs.assign(entropy_bits=math.nan), curves)["verdict"] == "not tested"
    row = judged(runs.drop(columns="entropy_bits"), curves)
    assert (row["verdict"], "entropy_bits" in row["reason"]) == ("not tested", True)
