"""Claims D1 to D5 on tables whose answer is known."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.store.tables import Tables

from ..handmade.sft import LRS, arm, tables

IDS = ["D1", "D2", "D3", "D4"]
EXAMPLES = 4096
BASE = 3.0  # the base's NLL
FULLFT = {8: 2.0, 32: 2.05, 128: 2.15}  # final test NLL by batch size
GAP = {8: 0.02, 32: 0.06, 128: 0.12}
HALFWAY = {8: 4.0, 32: 1.2, 128: 1.1}  # gap in the first half of the data, as a multiple of that in the second
MARGIN = 0.02 * (BASE - FULLFT[8] - 0.1)  # the validation NLL is 0.1 above the test NLL
NOISE = 0.0005


def jitter(key, scale):
    return scale * np.random.default_rng(zlib.crc32(key.encode())).standard_normal()


def world(gap=None, rank_gap=None, fullft=None, ranks=(4, 64), halfway=None, steps=None, noise=NOISE, **settings):
    """Make FullFT and LoRA at several batch sizes, in one pass over the same data; `settings` change all LoRA arms."""
    gap, fullft, halfway = GAP | (gap or {}), FULLFT | (fullft or {}), HALFWAY | (halfway or {})
    length = {size: (steps or {}).get(size, EXAMPLES // size) for size in gap}
    arms = []
    for size in gap:
        arms.append(arm(optimum=4e-4, floor=fullft[size], batch_size=size, steps=length[size]))
        for rank in ranks:
            floor = fullft[size] + gap[size] + (rank_gap or {}).get((rank, size), 0.0)
            arms.append(arm(rank, batch_size=size, steps=length[size], **{"optimum": 4e-3, "floor": floor} | settings))
    runs, _ = tables(arms)
    runs["final_test_nll"] += [jitter(run_id, noise) for run_id in runs["run_id"]]
    return runs, curves_of(runs, gap, halfway, noise)


def curves_of(runs, gap, halfway, noise):
    """Make the base's validation NLL, and training curves at 40 steps; the gap halves once, in the middle."""
    rows = []
    for run in runs.to_dict("records"):
        point = {"run_id": run["run_id"], "examples": 0, "tokens": 0, "metric": "nll"}
        rows.append(point | {"step": 0, "split": "validation", "value": BASE})
        for step in sorted({math.ceil(run["steps"] * share / 40) for share in range(1, 41)}):
            value = 2.0 + jitter(f"batch {run['batch_size']} {run['seed']} {step}", 0.1)
            if run["method"] == "lora":
                early = step <= run["steps"] / 2
                value += gap[run["batch_size"]] * (halfway[run["batch_size"]] if early else 1.0)
            value += jitter(f"{run['run_id']} {step}", noise)
            rows.append(point | {"step": step, "split": "train", "value": value})
    return pd.DataFrame(rows).astype({"step": "Int64"})


def judged(runs, curves, ids=IDS):
    claims = [claim for claim in CLAIMS if claim.id in ids]
    return judge_claims(Tables(runs, curves), claims).set_index("claim_id")


@pytest.fixture(scope="module")
def confirmed():
    return judged(*world(), ids=[*IDS, "D5"])


def test_every_claim_is_confirmed_where_all_hold(confirmed):
    assert confirmed["verdict"].to_dict() == dict.fromkeys(IDS, "confirmed") | {"D5": "not tested"}
    assert not confirmed["reason"].str.contains("nan").any()


def test_the_numbers_are_those_of_the_tables(confirmed):
    tolerance = {"abs": 4 * NOISE}
    assert confirmed.loc["D1", "estimate"] == pytest.approx(GAP[128] - GAP[8], **tolerance)
    assert confirmed.loc["D3", "estimate"] == pytest.approx(0.0, **tolerance)
    assert confirmed.loc["D4", "estimate"] == pytest.approx(FULLFT[128] - FULLFT[8], **tolerance)
    # The fall from halfway to the end at batch 8 is the smallest of what must be above 0.
    assert confirmed.loc["D2", "estimate"] == pytest.approx(GAP[128] - GAP[128] * HALFWAY[128] / 2, **tolerance)
    assert confirmed.loc[["D1", "D4"], "margin_low"].tolist() == pytest.approx([MARGIN, MARGIN], abs=3e-4)
    assert confirmed.loc["D1", "margin_rule"].endswith("2% of the gain from the base to FullFT (0.892 nats) at batch 8")
    assert confirmed.loc["D1", "n_runs"] == 3 * 3 * (len(LRS) + 2)


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("D1", {"rank_gap": {(64, 128): -0.11}}),  # one rank is enough
        ("D2", {"halfway": {128: 3.0}}),
        ("D2", {"halfway": {8: 1.0}}),
        ("D3", {"rank_gap": {(64, 32): 0.05}}),
        ("D4", {"fullft": {128: 1.9}}),
    ],
)
def test_contradicted_where_it_fails(claim, changes):
    assert judged(*world(**changes), ids=[claim]).loc[claim, "verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("claims", "changes", "remedy"),
    [
        (IDS, {"offsets": (0.0,)}, "3 seeds (now 1)"),
        (["D1", "D3", "D4"], {"noise": 0.06, "gap": {128: 0.06}, "fullft": {128: 2.06}}, "seeds"),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, changes, remedy):
    judged_claims = judged(*world(**changes))
    assert judged_claims.loc[claims, "verdict"].tolist() == ["inconclusive"] * len(claims)
    assert judged_claims.loc[claims, "would_decide"].str.contains(remedy, regex=False).all()
    assert not judged_claims["reason"].str.contains("nan").any()


def test_curves_that_disagree_leave_the_gap_in_time_open():
    runs, curves = world()
    seeds = curves["run_id"].map(runs.set_index("run_id")["seed"]).astype(int)
    lora = curves["run_id"].str.contains("-lora-") & curves["split"].eq("train")
    curves.loc[lora, "value"] += seeds[lora].map({0: 0.0, 1: 0.3, 2: -0.3})
    assert judged(runs, curves, ids=["D2"]).loc["D2", "verdict"] == "inconclusive"


def test_rank_1_is_left_out():
    runs, curves = world(ranks=(1, 4, 64), rank_gap={(1, 8): 0.5})
    assert judged(runs, curves)["verdict"].tolist() == ["confirmed"] * 4


def test_large_batches_are_a_condition():
    runs, curves = world(gap={16: 0.03}, fullft={16: 2.0}, halfway={16: 2.0})
    claims = judged(runs[runs["batch_size"].lt(128)], curves)
    assert claims["verdict"].tolist() == ["setting not met"] * 4
    assert claims["missing"].str.contains("here 8 to 32, with 128 steps at 32", regex=False).all()
    assert claims.loc["D1", "estimate"] == pytest.approx(GAP[32] - GAP[8], abs=4 * NOISE)


def test_no_training_curves_is_not_tested():
    runs, curves = world()
    for kept in (curves[curves["split"] != "train"], curves[curves["step"] < 20]):
        claims = judged(runs, kept, ids=["D1", "D2"])
        assert claims["verdict"].to_dict() == {"D1": "confirmed", "D2": "not tested"}


def test_batch_sizes_that_saw_other_amounts_of_data_decide_nothing():
    claims = judged(*world(steps={128: 64}))
    assert claims["verdict"].tolist() == ["inconclusive"] * 4
    assert "batch 128 8,192" in claims.loc["D1", "reason"]
    # As far as whole steps allow, it is the same data.
    assert judged(*world(steps={8: 480}), ids=["D1"]).loc["D1", "verdict"] == "confirmed"


def test_missing_arms():
    runs, curves = world()
    fullft, large = runs["method"].eq("fullft"), runs["batch_size"].eq(128)
    r64 = runs["rank"].eq(64).fillna(False)
    for kept in (runs[~fullft], runs[fullft], runs[~(fullft & large)], runs[~(r64 & large)]):
        assert "confirmed" not in set(judged(kept, curves, ids=["D1", "D2", "D4"])["verdict"])
    reason = judged(runs[~(r64 & large)], curves, ids=["D1"]).loc["D1", "reason"]
    assert reason.endswith("no runs of LoRA r64 at batch 128")
    claims = judged(runs[~r64], curves, ids=["D1", "D3"])
    assert claims["verdict"].to_dict() == {"D1": "confirmed", "D3": "not tested"}
