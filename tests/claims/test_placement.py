"""Claims E1 to E7 and M1 on tables whose answer is known."""

import pandas as pd
import pytest

from lorabench.claims.compute import PAPER_COUNTS

from ..handmade import rl
from ..handmade.sft import LRS, arm, tables
from . import jitter, judged, verdict_is

IDS = ["E1", "E2", "E3", "E4", "E7"]
PER_RANK = {"attn": 100, "mlp": 200, "all": 300}  # parameters
FLOORS = {("attn", 8): 2.2, ("attn", 17): 2.1, ("mlp", 8): 2.0, ("mlp", 16): 2.0, ("all", 8): 2.0, ("all", 16): 2.0}
NOISE = 0.0005
BASE = 3.0  # so that the margin is about 0.018


def world(changes=None, without=(), every=None, noise=NOISE, **same):
    """Make FullFT and LoRA by placement and rank; attn r17 has 6% more parameters than mlp r8."""
    arms = [arm(optimum=4e-4, floor=2.0, trainable_params=10_000, **same)]
    for (name, rank), floor in FLOORS.items():
        if (name, rank) in without or name in without:
            continue
        settings = {"optimum": 4e-3, "floor": floor, "trainable_params": PER_RANK[name] * rank}
        settings |= (every or {}) | (changes or {}).get((name, rank), {})
        arms.append(arm(rank, placement=name, **settings, **same))
    runs = tables(arms)[0]
    runs["final_test_nll"] += [noise * jitter(run_id) for run_id in runs["run_id"]]
    return runs


def placed(ids, runs):
    """Judge claims on runs whose base has a loss of BASE."""
    curves = pd.DataFrame({"run_id": runs["run_id"], "step": 0, "examples": 0, "tokens": 0})
    curves = curves.assign(split="validation", metric="nll", value=BASE).astype({"step": "Int64"})
    return judged(ids, runs, curves)


def moe(**settings):
    return world(model="sparse", family="qwen3_moe", **settings)


def both(**settings):
    """Make a dense and a sparse model on a tiny dataset."""
    return pd.concat([make(batch_size=8, steps=120, **settings) for make in (world, moe)])


def test_every_claim_is_confirmed_where_all_hold():
    confirmed = placed(IDS, both())
    assert confirmed.loc[IDS, "verdict"].to_dict() == dict.fromkeys(IDS, "confirmed")
    assert not confirmed["reason"].str.contains("nan").any()
    assert confirmed.loc["E1", "estimate"] == pytest.approx(0.1, abs=4 * NOISE)
    assert confirmed.loc["E1", "margin_low"] == pytest.approx(0.018, abs=3e-4)
    assert "LoRA r17 attn - LoRA r8 mlp" in confirmed.loc["E1", "reason"]
    assert "1,700 and 1,600 parameters" in confirmed.loc["E1", "reason"]
    assert confirmed.loc["E1", "n_runs"] == 2 * (len(LRS) + 2)
    assert confirmed.loc["E2", "estimate"] == pytest.approx(0.0, abs=4 * NOISE)
    for rank in (8, 16):
        assert f"LoRA r{rank} mlp - LoRA r{rank} =" in confirmed.loc["E2", "reason"]
    # The part that decides comes first; here it is the nearer one to its margin.
    assert confirmed.loc["E3", "reason"].startswith("the MLP against all layers (confirmed): sparse/instruct: ")
    assert "; attention against the MLP (confirmed): " in confirmed.loc["E3", "reason"]


@pytest.mark.parametrize(
    ("claims", "changes", "part"),
    [
        (["E1", "E3", "E4", "E7"], {("attn", 17): {"floor": 2.0}}, "attention against the MLP"),
        (["E2", "E3", "E4"], {("mlp", 8): {"floor": 2.03}}, "the MLP against all layers"),
    ],
)
def test_contradicted_where_it_fails(claims, changes, part):
    table = placed(claims, both(changes=changes))
    assert set(table["verdict"]) == {"contradicted"}
    assert table.loc[["E3", "E4"], "reason"].str.startswith(part).all()


@pytest.mark.parametrize(
    ("claims", "settings"),
    [
        pytest.param(IDS, {"every": {"offsets": (0.0,)}}, marks=pytest.mark.slow),
        (["E1", "E3", "E4", "E7"], {"changes": {("attn", 17): {"floor": 2.02}}, "noise": 0.03}),
        (["E1", "E3", "E4", "E7"], {"without": [("attn", 17)]}),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, settings):
    for _, row in placed(claims, both(**settings)).iterrows():
        verdict_is(row, "inconclusive")


def test_what_each_claim_is_about():
    worse = {("attn", 17): {"floor": 2.0}}
    claims = placed(["E1", "E3"], pd.concat([world(family="llama"), moe(changes=worse)]))
    assert claims["verdict"].tolist() == ["confirmed", "contradicted"]
    verdict_is(placed("E1", moe()), "not tested")
    # Without the column, all count as dense.
    assert placed(["E1", "E3"], world())["verdict"].tolist() == ["confirmed", "not tested"]
    # Half of the claim confirms nothing.
    verdict_is(placed("E3", moe(without=["attn", "mlp"])), "inconclusive")
    # More examples are no tiny dataset.
    verdict_is(placed("E7", world(batch_size=10, steps=100)), "confirmed")
    verdict_is(placed("E7", world(batch_size=10, steps=101)), "not tested")


@pytest.mark.parametrize(("attention", "verdict"), [(0.6, "confirmed"), (0.8, "contradicted")])
def test_placement_in_rl(attention, verdict):
    peaks = {("attn", 17): attention, ("mlp", 8): 0.8, ("all", 8): 0.8}
    runs, curves = tables(
        rl.arm(rank, optimum=2e-3, peak=peak, placement=name, trainable_params=PER_RANK[name] * rank)
        for (name, rank), peak in peaks.items()
    )
    runs["best_reward"] += [0.002 * jitter(run_id) for run_id in runs["run_id"]]
    part = f"attention against the MLP ({verdict}): tiny/problems: LoRA r17 attn - LoRA r8"
    verdict_is(judged("E5", runs, curves), verdict, part)


COUNTED = ["architecture", "placement", "part", "rank", "include_unembedding", "trainable_params"]


def test_parameter_counts():
    rows = [("llama-3.1-8b", name, "all", rank, True, count) for (name, rank), count in PAPER_COUNTS.items()]
    rows.append(("llama-3.1-8b", "mlp", "all", 256, False, 1))
    counts = pd.DataFrame(rows, columns=COUNTED).assign(base_params=8_030_261_248)
    counts = counts.astype({"trainable_params": "Int64", "rank": "Int64", "include_unembedding": "boolean"})
    exact = judged("E6", counts=counts)
    verdict_is(exact, "confirmed", "attn r256 251,985,920")
    assert (exact["estimate"], exact["n_runs"]) == (0, 0)
    off = judged("E6", counts=counts.assign(trainable_params=counts["trainable_params"] - [0, 3, 0, 0, 0]))
    verdict_is(off, "contradicted", "attn r256 is off by -3")
    assert off["estimate"] == -3
    verdict_is(judged("E6", counts=counts.drop(index=2)), "inconclusive", "all r256 is not counted")
    verdict_is(judged("E6", counts=counts.assign(architecture="qwen3-8b")), "not tested")
    verdict_is(judged("E6", counts=counts.iloc[4:]), "not tested")


def test_expert_ratio():
    shares = {"experts": 1e-3, "attention": 5e-3, "unembedding": 3e-3, "all": 1e-3}

    def claim(changes=None, without=()):
        rows = [
            ("qwen3-30b-a3b", "all", part, rank, True, round(share * rank * 1e8), 10**8)
            for rank in (8, 64)
            for part, share in (shares | (changes or {})).items()
            if part not in without
        ]
        return judged("M1", counts=pd.DataFrame(rows, columns=[*COUNTED, "base_params"]))

    # Without the division attention would be at 5 / 8 of the experts' share, which is nearer to 1 than 5.
    further = claim()
    assert (further["kind"], further["verdict"]) == ("count", "contradicted")
    assert further["estimate"] == pytest.approx(5.0)
    assert "attention / experts 5.00, unembedding / experts 3.00" in further["reason"]
    nearer = claim({"attention": 2e-3, "unembedding": 0.5e-3})
    assert (nearer["verdict"], nearer["estimate"]) == ("confirmed", pytest.approx(2.0))
    assert claim(without=["attention"])["verdict"] == "inconclusive"
