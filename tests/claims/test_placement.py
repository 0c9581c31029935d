from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.claims.parameter_counts import PAPER_COUNTS
from lorabench.tables.tables import Tables

from ..handmade.sft import LRS, arm, tables

IDS = ["E1", "E2", "E3", "E4", "E7"]
PER_RANK = {"attn": 100, "mlp": 200, "all": 300}  # parameters
FLOORS = {("attn", 8): 2.2, ("attn", 17): 2.1, ("mlp", 8): 2.0, ("mlp", 16): 2.0, ("all", 8): 2.0, ("all", 16): 2.0}
NEARLY_PAIRED = (0.0, 0.0045, -0.0042)


def world(changes=None, without=(), batch_size=16, steps=128, every=None, **columns):
    """Make FullFT and LoRA by placement and rank; attn r17 has 6% more parameters than mlp r8."""
    same = {"batch_size": batch_size, "steps": steps, **columns}
    arms = [arm(optimum=3e-4, floor=2.0, trainable_params=10_000, **same)]
    for (name, rank), floor in FLOORS.items():
        if (name, rank) in without or name in without:
            continue
        settings = {"optimum": 3e-3, "floor": floor, "trainable_params": PER_RANK[name] * rank}
        offsets = {"offsets": NEARLY_PAIRED} if name == "mlp" else {}
        settings |= offsets | (every or {}) | (changes or {}).get((name, rank), {})
        arms.append(arm(rank, placement=name, **settings, **same))
    return tables(arms)[0]


def judged(runs, counts=None, ids=(*IDS, "E6", "M1")):
    tables_read = Tables(runs, pd.DataFrame(), counts=pd.DataFrame() if counts is None else counts)
    return judge_claims(tables_read, [claim for claim in CLAIMS if claim.id in ids]).set_index("claim_id")


def moe(**settings):
    return world(model="sparse", family="qwen3_moe", **settings)


@pytest.fixture(scope="module")
def confirmed():
    return judged(pd.concat([world(family="llama", batch_size=8, steps=120), moe(batch_size=8, steps=120)]))


def test_every_claim_is_confirmed_where_all_hold(confirmed):
    assert confirmed.loc[IDS, "verdict"].to_dict() == dict.fromkeys(IDS, "confirmed")
    assert not confirmed["reason"].str.contains("nan").any()


def test_the_numbers_are_those_of_the_tables(confirmed):
    assert confirmed.loc["E1", "estimate"] == pytest.approx(0.1 - sum(NEARLY_PAIRED) / 3)
    assert "LoRA r17 attn - LoRA r8 mlp" in confirmed.loc["E1", "reason"]
    assert "1,700 and 1,600 parameters" in confirmed.loc["E1", "reason"]
    assert confirmed.loc["E1", "n_runs"] == 2 * (len(LRS) + 2)
    assert confirmed.loc["E2", "estimate"] == pytest.approx(sum(NEARLY_PAIRED) / 3)
    assert "LoRA r8 mlp - LoRA r8 =" in confirmed.loc["E2", "reason"]
    assert "LoRA r16 mlp - LoRA r16 =" in confirmed.loc["E2", "reason"]
    for claim in ("E1", "E2"):
        assert confirmed.loc[claim, "reason"].startswith("tiny/instruct")
    assert confirmed.loc["E3", "reason"].startswith("sparse/instruct")
    for claim in ("E3", "E4"):
        assert "attention alone is worse? confirmed" in confirmed.loc[claim, "reason"]
        assert "the MLP alone is enough? confirmed" in confirmed.loc[claim, "reason"]
    assert "960 examples" in confirmed.loc["E7", "reason"]


@pytest.mark.parametrize(
    ("claims", "changes"),
    [
        (["E1", "E3", "E4", "E7"], {("attn", 17): {"floor": 2.0}}),
        (["E1", "E3", "E4", "E7"], {("attn", 17): {"floor": 1.9}}),
        (["E2", "E3", "E4"], {("mlp", 8): {"floor": 2.03}}),
        (["E2", "E3", "E4"], {("mlp", 16): {"floor": 1.97}}),
    ],
)
def test_contradicted_where_it_fails(claims, changes):
    runs = pd.concat([make(changes=changes, batch_size=8, steps=120) for make in (world, moe)])
    assert judged(runs, ids=claims).loc[claims, "verdict"].tolist() == ["contradicted"] * len(claims)


@pytest.mark.parametrize(
    ("claims", "settings"),
    [
        (IDS, {"every": {"offsets": (0.0,)}}),
        (IDS, {"every": {"offsets": (0.0, 0.004)}}),
        (IDS, {"every": {"lrs": LRS[:4]}}),
        (["E1", "E3", "E4", "E7"], {"changes": {("attn", 17): {"floor": 2.03, "offsets": (0.03, -0.03, 0.01)}}}),
        (["E2", "E3", "E4"], {"changes": {("mlp", 8): {"offsets": (0.01, -0.01, 0.01)}}}),
        (["E2"], {"every": {"offsets": (0.0, 0.5, -0.5)}}),
        (["E1", "E3", "E4", "E7"], {"without": [("attn", 17)]}),
        (["E1", "E3", "E4", "E7"], {"without": ["attn"]}),
        (IDS, {"without": ["mlp"]}),
        (["E2", "E3", "E4"], {"without": ["all"]}),
        (["E2", "E3", "E4"], {"without": [("all", 8), ("mlp", 16)]}),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, settings):
    runs = pd.concat([make(**settings, batch_size=8, steps=120) for make in (world, moe)])
    judged_claims = judged(runs)
    assert judged_claims.loc[claims, "verdict"].tolist() == ["inconclusive"] * len(claims)
    assert not judged_claims["reason"].str.contains("nan").any()


def test_half_of_the_claim_confirms_nothing():
    claims = judged(moe(without=["attn", "mlp"]), ids=["E3"])
    assert claims.loc["E3", "verdict"] == "inconclusive"
    assert judged(moe(without=["attn", "mlp", "all"]), ids=["E3"]).loc["E3", "verdict"] == "not tested"


def test_of_equal_counts_attention_with_more_parameters_comes_first():
    fewer = {("attn", 8): {"trainable_params": 1590}}
    assert "LoRA r17 attn - LoRA r8 mlp" in judged(world(fewer), ids=["E1"]).loc["E1", "reason"]
    # Without such a pair, the nearest.
    claim = judged(world(fewer, without=[("attn", 17)]), ids=["E1"]).loc["E1"]
    assert "LoRA r8 attn - LoRA r8 mlp" in claim["reason"]
    assert claim["verdict"] == "confirmed"


def test_two_parameter_counts_of_one_arm_decide_nothing():
    runs = world()
    runs.loc[runs["placement"].eq("attn") & runs["seed"].eq(1), "trainable_params"] += 5
    assert judged(runs, ids=["E1"]).loc["E1", "verdict"] == "inconclusive"
    assert judged(runs.drop(columns="trainable_params"), ids=["E1"]).loc["E1", "verdict"] == "not tested"
    assert judged(runs.drop(columns="trainable_params"), ids=["E2"]).loc["E2", "verdict"] == "confirmed"


def test_dense_models_and_mixtures_of_experts_are_judged_apart():
    worse = {("attn", 17): {"floor": 2.0}}
    claims = judged(pd.concat([world(family="llama"), moe(changes=worse)]), ids=["E1", "E3"])
    assert claims.loc[["E1", "E3"], "verdict"].tolist() == ["confirmed", "contradicted"]
    assert judged(moe(), ids=["E1"]).loc["E1", "verdict"] == "not tested"
    # Without the column, all count as dense.
    for runs in (world(), world(family=None), world(family="qwen3")):
        assert judged(runs, ids=["E1", "E3"]).loc[["E1", "E3"], "verdict"].tolist() == ["confirmed", "not tested"]


def test_more_examples_are_no_tiny_dataset():
    assert judged(world(batch_size=10, steps=100), ids=["E7"]).loc["E7", "verdict"] == "confirmed"
    assert judged(world(batch_size=10, steps=101), ids=["E7"]).loc["E7", "verdict"] == "not tested"
    assert judged(world(batch_size=10, steps=101), ids=["E4"]).loc["E4", "verdict"] == "confirmed"


def test_only_runs_of_the_claims_experiment_are_read():
    claims = judged(world(batch_size=8, steps=120).assign(experiments="placement"), ids=["E1", "E2", "E4", "E7"])
    assert claims.loc[["E1", "E2", "E4", "E7"], "verdict"].tolist() == ["confirmed"] * 2 + ["not tested"] * 2


def counts_by_hand(changes=None):
    rows = [("llama-3.1-8b", name, "all", rank, True, count) for (name, rank), count in PAPER_COUNTS.items()] + [
        ("llama-3.1-8b", "mlp", "all", 256, False, 1)
    ]
    frame = pd.DataFrame(
        rows, columns=["architecture", "placement", "part", "rank", "include_unembedding", "trainable_params"]
    ).assign(base_params=8_030_261_248)
    for place, change in (changes or {}).items():
        frame.loc[place, "trainable_params"] += change
    return frame.astype({"trainable_params": "Int64", "rank": "Int64", "include_unembedding": "boolean"})


def test_parameter_counts():
    def claim(counts):
        return judged(pd.DataFrame(), counts, ids=["E6"]).loc["E6"]

    exact = claim(counts_by_hand())
    assert (exact["verdict"], exact["estimate"], exact["n_runs"]) == ("confirmed", 0, 0)
    assert "attn r256 251,985,920" in exact["reason"]
    off = claim(counts_by_hand({1: -3}))
    assert (off["verdict"], off["estimate"]) == ("contradicted", -3)
    assert "attn r256 is off by -3" in off["reason"]
    missing = claim(counts_by_hand().drop(index=2))
    assert missing["verdict"] == "inconclusive"
    assert "all r256 is not counted" in missing["reason"]
    for none in (pd.DataFrame(), counts_by_hand().assign(architecture="qwen3-8b"), counts_by_hand().iloc[4:]):
        assert claim(none)["verdict"] == "not tested"


def test_expert_ratio():
    shares = {"experts": 1e-3, "attention": 5e-3, "unembedding": 3e-3, "all": 1e-3}

    def claim(changes=None, without=()):
        rows = [
            ("qwen3-30b-a3b", "all", part, rank, True, round(share * rank * 1e8), 10**8)
            for rank in (8, 64)
            for part, share in (shares | (changes or {})).items()
            if part not in without
        ]
        columns = ["architecture", "placement", "part", "rank", "include_unembedding"]
        return judged(
            pd.DataFrame(), pd.DataFrame(rows, columns=[*columns, "trainable_params", "base_params"]), ids=["M1"]
        ).loc["M1"]

    same = claim()
    assert same["verdict"] == "confirmed"
    assert same["estimate"] == pytest.approx(5.0)
    assert "(attention / experts 5.0, unembedding / experts 3.0)" in same["reason"]
    assert claim({"unembedding": 2e-2})["verdict"] == "contradicted"
    lower = claim({"attention": 5e-5})
    assert (lower["verdict"], lower["estimate"]) == ("contradicted", pytest.approx(0.05))
    assert claim(without=["attention"])["verdict"] == "inconclusive"
    assert claim(without=list(shares))["verdict"] == "not tested"
    assert not math.isnan(same["estimate"])
