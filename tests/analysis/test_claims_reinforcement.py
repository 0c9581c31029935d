from __future__ import annotations

import pandas as pd
import pytest

from lorabench.analysis.claims import judge_claims, reinforcement
from lorabench.tables import Tables
from tests.analysis.tables_by_hand import arm, tables

IDS = ["B10", "E5", "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9"]


def judged(runs=None, counts=None):
    found = Tables(*(pd.DataFrame() if one is None else one for one in (runs, None, None, counts)))
    return judge_claims(found, reinforcement.CLAIMS).set_index("claim_id")


def rank_1(with_head=2_753_792, without_head=2_621_440, **changes):
    rows = {
        "architecture": "llama-3.1-8b",
        "placement": "all",
        "part": "all",
        "rank": 1,
        "include_unembedding": [True, False],
        "trainable_params": [with_head, without_head],
        "base_params": 8_030_261_248,
    }
    return pd.DataFrame(rows | changes)


def test_claims_about_rewards_are_not_tested_on_losses():
    runs, _ = tables([arm(optimum=3e-4), arm(1, optimum=3e-3)])
    every = runs.assign(experiments="rl_math rl_gsm8k rl_deepmath rl_arithmetic placement_rl")
    for found in (judged(), judged(runs.assign(experiments="rank")), judged(every)):
        assert list(found.index) == IDS
        assert set(found["verdict"]) == {"not tested"}
        assert (found["n_runs"] == 0).all()
    assert judged(every).loc["F1", "reason"] == (
        "the tables hold no reinforcement learning: it needs final rewards of rank 1 and FullFT"
    )


def test_rank_1_against_the_bits_of_math():
    found = judged(counts=rank_1()).loc["F6"]
    assert found["verdict"] == "confirmed"
    assert found["estimate"] == pytest.approx(2_753_792 / 320_000)
    assert "2,621,440 without the unembedding (8.2 times)" in found["reason"]
    assert "2,753,792 with the unembedding (8.6 times)" in found["reason"]
    assert judged(counts=rank_1(without_head=300_000)).loc["F6", "verdict"] == "contradicted"


@pytest.mark.parametrize(
    "counts", [pd.DataFrame(), rank_1(rank=2), rank_1(placement="mlp"), rank_1(part="experts"), rank_1().iloc[1:]]
)
def test_without_that_count_it_is_not_tested(counts):
    assert judged(counts=counts).loc["F6", "verdict"] == "not tested"
