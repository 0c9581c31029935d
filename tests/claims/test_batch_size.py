from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.claims import batch_size
from lorabench.claims.judge import judge_claims
from lorabench.tables.tables import Tables

from ..handmade.sft import LRS, arm, tables

IDS = ["D1", "D2", "D3", "D4", "D5"]
EXAMPLES = 1024
SIZES = (8, 32, 128)
FULLFT = {8: 2.0, 32: 2.05, 128: 2.15}  # final test NLL by batch size
GAP = {8: 0.02, 32: 0.06, 128: 0.12}
HALFWAY = {8: 2.0, 32: 1.2, 128: 1.1}  # gap halfway through the data, as a multiple of the last
NEARLY_PAIRED = (0.0, 0.0045, -0.0042)


def world(gap=None, rank_gap=None, fullft=None, ranks=(4, 64), halfway=None, steps=None, **settings):
    """Make FullFT and LoRA at three batch sizes, in one pass over the same data; `settings` change all LoRA arms."""
    gap, fullft, halfway = GAP | (gap or {}), FULLFT | (fullft or {}), HALFWAY | (halfway or {})
    sizes = [size for size in gap if size in SIZES]
    length = {size: (steps or {}).get(size, EXAMPLES // size) for size in sizes}
    arms = []
    for size in sizes:
        arms.append(arm(optimum=3e-4, floor=fullft[size], batch_size=size, steps=length[size]))
        for rank in ranks:
            floor = fullft[size] + gap[size] + (rank_gap or {}).get((rank, size), 0.0)
            lora = {"optimum": 3e-3, "floor": floor, "offsets": NEARLY_PAIRED} | settings
            arms.append(arm(rank, batch_size=size, steps=length[size], **lora))
    runs, _ = tables(arms)
    return runs, curves_of(runs, gap, halfway)


def curves_of(runs, gap, halfway):
    """Make validation curves that end at each run's final loss; LoRA's gap is linear in log(share of the data)."""
    rows = []
    for run in runs.dropna(subset=["final_valid_nll"]).to_dict("records"):
        size = run["batch_size"]
        for step in sorted({0, *(max(1, round(run["steps"] * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0))}):
            share = max(step, 0.01) / run["steps"]
            value = run["final_valid_nll"] + 0.3 * (1 - share)
            if run["method"] == "lora":
                value += gap[size] * (halfway[size] - 1) * math.log2(1 / share)
            point = {"run_id": run["run_id"], "step": step, "examples": step * size, "tokens": 0}
            rows.append(point | {"split": "validation", "metric": "nll", "value": value})
    return pd.DataFrame(rows).astype({"step": "Int64"})


def judged(runs, curves, ids=IDS):
    claims = [claim for claim in batch_size.CLAIMS if claim.id in ids]
    return judge_claims(Tables(runs, curves), claims).set_index("claim_id")


@pytest.fixture(scope="module")
def confirmed():
    return judged(*world())


def test_every_claim_is_confirmed_where_all_hold(confirmed):
    claims = confirmed
    assert claims["verdict"].to_dict() == dict.fromkeys(IDS[:4], "confirmed") | {"D5": "not tested"}
    assert not claims["reason"].str.contains("nan").any()
    assert claims["reason"].str.contains("LoRA r4").sum() == 4


def test_the_numbers_are_those_of_the_tables(confirmed):
    claims = confirmed
    shift = np.mean(NEARLY_PAIRED)  # of LoRA's seeds against FullFT's, which cancels between batch sizes
    assert claims.loc["D1", "estimate"] == pytest.approx(GAP[128] - GAP[8])
    assert claims.loc["D3", "estimate"] == pytest.approx(0.0, abs=1e-12)
    assert claims.loc["D4", "estimate"] == pytest.approx(0.15)  # FullFT strains it most
    # The fall from halfway to the end at batch 8 is the smallest of what must be above 0.
    assert claims.loc["D2", "estimate"] == pytest.approx(GAP[8] * (HALFWAY[8] - 1))
    assert f"gap at the end at batch 128: {GAP[128] + shift:.4f}" in claims.loc["D2", "reason"]
    kept = GAP[128] + shift - (GAP[128] * HALFWAY[128] + shift) / 2
    assert f"less half of its value halfway: {kept:.4f}" in claims.loc["D2", "reason"]
    for claim in IDS[:4]:
        low, estimate, high = claims.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low - 1e-9 <= estimate <= high + 1e-9
    assert claims.loc["D1", "n_runs"] == 3 * 3 * (len(LRS) + 2)
    assert claims.loc["D2", "n_runs"] == 2 * 3 * (len(LRS) + 2)


def test_rank_1_is_left_out():
    runs, curves = world(ranks=(1, 4, 64), rank_gap={(1, 8): 0.5})
    assert judged(runs, curves)["verdict"].tolist()[:4] == ["confirmed"] * 4


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("D1", {"gap": {128: 0.02}}),
        ("D1", {"gap": {32: 0.2}}),  # falls from 32 to 128
        ("D1", {"gap": {8: 0.2, 32: 0.1}}),
        ("D1", {"rank_gap": {(64, 128): -0.11}}),  # one rank is enough
        ("D2", {"halfway": {128: 3.0}}),
        ("D2", {"halfway": {8: 0.2}}),
        ("D2", {"gap": {8: 0.2}}),
        ("D2", {"gap": {128: -0.05}}),
        ("D3", {"rank_gap": {(64, 32): 0.05}}),
        ("D3", {"rank_gap": {(4, 128): 0.05}}),
        ("D4", {"fullft": {128: 1.9}}),
        ("D4", {"gap": {128: -0.2}}),
    ],
)
def test_contradicted_where_it_fails(claim, changes):
    assert judged(*world(**changes), ids=[claim]).loc[claim, "verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("claims", "changes"),
    [
        (["D1", "D2", "D3", "D4"], {"offsets": (0.0,)}),
        (["D1", "D2", "D3", "D4"], {"offsets": (0.0, 0.004)}),
        (["D1", "D2", "D3", "D4"], {"lrs": LRS[:4]}),
        (["D1", "D2", "D3"], {"lrs": LRS[:4], "gap": {128: 0.02}}),
        (["D3"], {"offsets": (0.0, 0.5, -0.5)}),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, changes):
    judged_claims = judged(*world(**changes))
    assert judged_claims.loc[claims, "verdict"].tolist() == ["inconclusive"] * len(claims)
    assert not judged_claims["reason"].str.contains("nan").any()


def of_seed(runs, size, by_seed, ranks=(4, 64)):
    """Return the runs with some ranks' test losses at a batch size changed by seed, which no pairing cancels."""
    for seed, change in by_seed.items():
        changed = runs["rank"].isin(ranks) & runs["batch_size"].eq(size) & runs["seed"].eq(seed)
        runs.loc[changed, "final_test_nll"] += change
    return runs


def test_seeds_that_disagree_leave_differences_between_batch_sizes_open():
    runs, curves = world()
    claims = judged(of_seed(runs, 128, {1: 0.3, 2: -0.3}), curves, ids=["D1", "D4"])
    assert claims.loc[["D1", "D4"], "verdict"].tolist() == ["inconclusive"] * 2


def test_seeds_that_disagree_leave_the_difference_between_ranks_open():
    runs, curves = world()
    claim = judged(of_seed(runs, 32, {1: 0.02, 2: -0.02}, ranks=[64]), curves, ids=["D3"]).loc["D3"]
    assert claim["verdict"] == "inconclusive"
    assert "batch 32" in claim["reason"].split(";")[0]


def test_a_rise_within_the_noise_is_not_confirmed():
    # Overall it grows, but the step from 8 to 32 is slightly down, within its interval.
    runs, curves = world(gap={32: 0.018})
    claim = judged(of_seed(runs, 32, {1: 0.01, 2: -0.01}), curves, ids=["D1"]).loc["D1"]
    assert claim["verdict"] == "inconclusive"
    assert claim["ci_low"] > 0


def test_seeds_that_disagree_on_the_curve_leave_it_open():
    runs, curves = world()
    seeds = runs.set_index("run_id")["seed"]
    noisy = curves["run_id"].str.contains("-lora-") & (curves["step"] == 64)
    curves.loc[noisy, "value"] += curves.loc[noisy, "run_id"].map(seeds).map({0: 0.0, 1: 0.1, 2: -0.1}).astype(float)
    assert judged(runs, curves, ids=["D2"]).loc["D2", "verdict"] == "inconclusive"


def test_envelopes_that_say_otherwise_leave_it_open():
    runs, curves = world()
    # A larger LR is better halfway at batch 8, so that LoRA's envelope has a smaller gap there than its best LR has.
    ids = runs.loc[runs["method"].eq("lora") & runs["batch_size"].eq(8) & runs["lr"].eq(1e-2), "run_id"]
    curves.loc[curves["run_id"].isin(ids) & (curves["step"] == 64), "value"] -= 0.5
    claim = judged(runs, curves, ids=["D2"]).loc["D2"]
    assert claim["verdict"] == "inconclusive"
    assert "envelopes say otherwise" in claim["reason"]


def test_no_curves_halfway_is_not_tested():
    runs, curves = world()
    lengths = curves["run_id"].map(runs.set_index("run_id")["steps"])
    for kept in (curves.iloc[:0], curves[curves["step"] == lengths], pd.DataFrame()):
        claims = judged(runs, kept, ids=["D1", "D2"])
        assert claims.loc["D2", "verdict"] == "not tested"
        assert claims.loc["D1", "verdict"] == "confirmed"


def test_a_repeat_that_diverged_decides_nothing():
    runs, curves = world(offsets=(*NEARLY_PAIRED, 0.001))
    lost = runs["rank"].eq(64) & runs["batch_size"].eq(128) & runs["seed"].eq(3)
    runs.loc[lost, ["status", "final_valid_nll", "final_test_nll"]] = ["diverged", math.nan, math.nan]
    claims = judged(runs, curves)
    assert claims.loc[IDS[:4], "verdict"].tolist() == ["inconclusive"] * 4


@pytest.mark.parametrize("sizes", [(8,), (8, 128)])
def test_fewer_than_three_batch_sizes_are_not_tested(sizes):
    runs, curves = world()
    claims = judged(runs[runs["batch_size"].isin(sizes)], curves)
    assert set(claims["verdict"]) == {"not tested"}
    assert claims.loc[IDS[:4], "reason"].str.contains("3 batch sizes needed").all()


def test_batch_sizes_that_saw_other_amounts_of_data_decide_nothing():
    claims = judged(*world(steps={128: 16}))
    assert claims.loc[IDS[:4], "verdict"].tolist() == ["inconclusive"] * 4
    assert "batch 128 2,048" in claims.loc["D1", "reason"]
    # As far as whole steps allow, it is the same data.
    assert judged(*world(steps={8: 120}), ids=["D1"]).loc["D1", "verdict"] == "confirmed"


def test_unknown_lengths_are_not_tested():
    runs, curves = world()
    claims = judged(runs.drop(columns="steps"), curves)
    assert claims.loc[IDS[:4], "verdict"].tolist() == ["not tested"] * 4


def test_missing_arms():
    runs, curves = world()
    fullft, large = runs["method"].eq("fullft"), runs["batch_size"].eq(128)
    r64 = runs["rank"].eq(64).fillna(False)
    for kept in (runs[~fullft], runs[fullft], runs[~(fullft & large)], runs[~(r64 & large)]):
        assert "confirmed" not in set(judged(kept, curves, ids=["D1", "D2", "D4"]).loc[["D1", "D2", "D4"], "verdict"])
    assert (
        judged(runs[~(r64 & large)], curves, ids=["D1"])
        .loc["D1", "reason"]
        .endswith("no runs of LoRA r64 at batch 128")
    )
    assert judged(runs[~r64], curves, ids=["D3"]).loc["D3", "verdict"] == "not tested"
    assert judged(runs[~r64], curves, ids=["D1"]).loc["D1", "verdict"] == "confirmed"


def test_every_model_and_dataset_counts():
    runs, curves = world()
    other, other_curves = world(gap={8: 0.2, 32: 0.1})
    other = other.assign(dataset="worked", run_id=other["run_id"] + "w")
    other_curves = other_curves.assign(run_id=other_curves["run_id"] + "w")
    claim = judged(pd.concat([runs, other]), pd.concat([curves, other_curves]), ids=["D1"]).loc["D1"]
    assert claim["verdict"] == "contradicted"
    assert claim["reason"].startswith("tiny/worked: ")
    assert "tiny/instruct: " in claim["reason"]
