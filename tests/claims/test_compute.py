from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabench.analysis.arms import each_arm
from lorabench.analysis.step_flops import each_setting, equal_flops_gap, flops_ratio, loss_by_flops
from lorabench.claims.compute import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.errors import UserError
from lorabench.tables.tables import Tables

from ..handmade.sft import LRS, arm, tables

QUIET = (0.0, 1e-4, -1e-4)  # offsets of seeds; sigma is 1e-4
FULLFT_FLOPS = 3e12

# In steps all arms learn alike; in FLOPs LoRA up to rank 16 spends 0.7 of what FullFT does.
WORLD = {
    None: {"optimum": 3.2e-4, "train_flops": FULLFT_FLOPS},
    4: {"optimum": 3.3e-3, "train_flops": 0.68 * FULLFT_FLOPS},
    16: {"optimum": 3.2e-3, "train_flops": 0.7 * FULLFT_FLOPS},
    64: {"optimum": 3.3e-3, "train_flops": 1.4 * FULLFT_FLOPS},
}


def world(changes=None, offsets=QUIET, hidden_size=128, **every):
    changes = changes or {}
    every |= {"offsets": offsets, "hidden_size": hidden_size}
    return tables(arm(rank, **(own | every | changes.get(rank, {}))) for rank, own in WORLD.items())


def compute_table(ranks=(1, 8, 64), width=150.0, **columns):
    """Make rows whose FLOPs follow the formula exactly; LoRA takes 0.9 of the time and half of the memory."""
    rows = [
        {
            "model": "tiny",
            "method": "fullft" if rank is None else "lora",
            "rank": rank,
            "placement": None if rank is None else "all",
            "batch_size": 8,
            "sequence_length": 128,
            "effective_width": width,
            "linear_flops": 3e9 * (1.0 if rank is None else 2 / 3 + 2 * rank / width),
            "total_flops": 4e9,
            "step_s": 1.0 if rank is None else 0.9,
            "peak_mem_bytes": 1000 if rank is None else 500,
            "device": "cpu",
            "threads": 1,
        }
        for rank in (None, *ranks)
    ]
    return pd.DataFrame(rows).astype({"rank": "Int64", "peak_mem_bytes": "Int64"}).assign(**columns)


def judged(claim_id, runs=None, curves=None, compute=None):
    claims = [claim for claim in CLAIMS if claim.id == claim_id]
    nothing = pd.DataFrame()
    table = judge_claims(Tables(*(nothing if t is None else t for t in (runs, curves, compute))), claims)
    return table.iloc[0]


def changed(compute, column, factor, rank=8):
    of_rank = compute["rank"].eq(rank).fillna(False)
    return compute.assign(**{column: compute[column].where(~of_rank, compute[column] * factor)})


def test_g1_is_confirmed_where_every_count_is_the_formula():
    claim = judged("G1", compute=compute_table())
    assert claim["verdict"] == "confirmed"
    assert claim["estimate"] == pytest.approx(0, abs=1e-12)
    assert claim["ci_low"] == claim["ci_high"] == claim["estimate"]
    assert claim["reason"] == (
        "tiny: FLOPs of LoRA / FullFT r1 0.6800 (formula 0.6800), r8 0.7733 (formula 0.7733), "
        "r64 1.5200 (formula 1.5200); step time r1 0.90, r8 0.90, r64 0.90"
    )
    # Time is reported but not judged.
    assert judged("G1", compute=compute_table(step_s=[1.0, 5.0, 5.0, 5.0]))["verdict"] == "confirmed"


@pytest.mark.parametrize(("factor", "verdict"), [(1.0099, "confirmed"), (0.9901, "confirmed")])
def test_g1_allows_one_percent(factor, verdict):
    assert judged("G1", compute=changed(compute_table(), "linear_flops", factor))["verdict"] == verdict


@pytest.mark.parametrize("factor", [1.011, 0.989, 3.0])
def test_g1_is_contradicted_by_one_rank_of_one_model(factor):
    other = changed(compute_table(), "linear_flops", factor).assign(model="other")
    claim = judged("G1", compute=pd.concat([compute_table(), other]))
    assert claim["verdict"] == "contradicted"
    assert claim["estimate"] == pytest.approx(factor - 1)
    assert claim["reason"].startswith("other: ")
    assert "tiny: " in claim["reason"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table[table["method"] == "lora"], "no count of FullFT or LoRA for r1, r8, r64"),
        (lambda table: changed(table, "linear_flops", math.nan), "no count of FullFT or LoRA for r8"),
        (lambda table: changed(table, "effective_width", math.nan), "no count of FullFT or LoRA for r8"),
        (lambda table: table.assign(batch_size=[4, 8, 8, 8]), "no count of FullFT"),
    ],
)
def test_g1_is_inconclusive_where_a_count_is_missing(change, reason):
    claim = judged("G1", compute=change(compute_table()))
    assert claim["verdict"] == "inconclusive"
    assert reason in claim["reason"]
    assert "nan" not in claim["reason"]


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (None, "no table compute"),
        (compute_table().iloc[:1], "no LoRA"),
        (compute_table().drop(columns=["rank", "linear_flops"]), "the compute table has no column rank, linear_flops"),
    ],
)
@pytest.mark.parametrize("claim", ["G1", "G3"])
def test_without_the_table_nothing_is_tested(claim, compute, reason):
    judged_claim = judged(claim, compute=compute)
    assert judged_claim["verdict"] == "not tested"
    assert reason in judged_claim["reason"]


def test_g1_needs_no_more_than_counts():
    bare = compute_table()[["model", "method", "rank", "effective_width", "linear_flops"]]
    claim = judged("G1", compute=bare)
    assert claim["verdict"] == "confirmed"
    assert "step time not measured" in claim["reason"]


def test_g2_is_confirmed_where_lora_is_ahead_at_every_compute():
    runs, curves = world()
    claim = judged("G2", runs, curves)
    assert claim["verdict"] == "confirmed"
    assert "LoRA r16 - FullFT" in claim["reason"]
    assert claim["ci_low"] < claim["estimate"] < claim["ci_high"] <= 0
    of_both = runs[runs["method"].eq("fullft") | runs["rank"].eq(16).fillna(False)]
    assert claim["run_ids"] == sorted(of_both["run_id"])


def test_g2_is_the_gap_where_it_is_largest():
    claim = judged("G2", *world({16: {"optimum": 3e-3}, None: {"optimum": 3e-4}}))
    # Envelopes are 2 + 1/step, with FLOPs 3e12 step/128 and 0.7 of that: LoRA ends at 0.7 x 128 = 89.6 of FullFT's
    # steps, between 64 and 128. There it is least ahead, since the curves flatten.
    share = math.log(89.6 / 64) / math.log(2)
    assert claim["estimate"] == pytest.approx(1 / 128 - ((1 - share) / 64 + share / 128))
    # Four arms with two repeats each give sigma 1e-4 and 8 degrees of freedom.
    assert claim["ci_high"] - claim["estimate"] == pytest.approx(2.306 * math.sqrt(2) * 1e-4, rel=1e-3)


def test_g2_is_contradicted_where_lora_is_behind():
    assert judged("G2", *world({16: {"leaves_at": 64}}))["verdict"] == "contradicted"
    # Alike in steps but dearer: behind in FLOPs, by little and surely.
    dear = judged("G2", *world({16: {"train_flops": 1.4 * FULLFT_FLOPS}}))
    assert dear["verdict"] == "contradicted"
    assert 0 < dear["ci_low"] < dear["ci_high"] < 0.2


def test_g2_looks_at_the_second_half_only():
    # LoRA is far behind up to step 4, of 128, and ahead later.
    runs, curves = world()
    slow = curves["run_id"].str.contains("lora-16") & curves["step"].le(4)
    assert judged("G2", runs, curves.assign(value=curves["value"] + slow * 0.5))["verdict"] == "confirmed"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (world(offsets=(0.0, 0.004, -0.004)), "sigma 0.0040"),
        (world(offsets=(0.0,)), "noise not measured"),
        (world({16: {"lrs": LRS[:4]}}), "LoRA r16: best LR at the edge of its grid"),
        (world({None: {"lrs": LRS[1:]}}), "FullFT: best LR at the edge of its grid"),
        (world(hidden_size=16), "no runs of LoRA up to rank 2 (hidden size 16)"),
    ],
)
def test_g2_is_inconclusive(given, reason):
    claim = judged("G2", *given)
    assert claim["verdict"] == "inconclusive"
    assert reason in claim["reason"]


def test_g2_without_flops_or_curves_is_not_tested():
    runs, curves = world()
    for column in ("hidden_size", "train_flops", "train_tokens"):
        claim = judged("G2", runs.drop(columns=column), curves)
        assert claim["verdict"] == "not tested"
        assert f"no column {column}" in claim["reason"]
        assert judged("G2", runs.assign(**{column: math.nan}), curves)["verdict"] == "not tested"
    assert judged("G2", runs, curves.iloc[:0])["verdict"] == "not tested"
    assert judged("G2", runs, pd.DataFrame())["verdict"] == "not tested"
    assert judged("G2", runs, curves.drop(columns="tokens"))["verdict"] == "not tested"


def test_g2_needs_both_methods():
    runs, curves = world()
    assert judged("G2", runs[runs["method"] == "lora"], curves)["verdict"] == "inconclusive"
    assert judged("G2", runs[runs["method"] == "fullft"], curves)["verdict"] == "inconclusive"


def test_g3_reports_memory_and_is_not_tested():
    claim = judged("G3", compute=compute_table())
    assert claim["verdict"] == "not tested"
    assert "FullFT / LoRA: tiny r1 2.00, tiny r8 2.00, tiny r64 2.00" in claim["reason"]
    assert math.isnan(claim["estimate"])
    unknown = judged("G3", compute=compute_table().astype({"peak_mem_bytes": float}).assign(peak_mem_bytes=math.nan))
    assert unknown["reason"] == "memory was not measured"


def test_ratios_are_within_a_setting():
    big = compute_table(batch_size=16, linear_flops=[6e9, 4e9, 4e9, 4e9], step_s=2.0)
    ratios = flops_ratio(pd.concat([big, compute_table()])).set_index(["batch_size", "rank"])
    assert len(ratios) == 6
    assert ratios.loc[(8, 8), "flops_ratio"] == pytest.approx(2 / 3 + 16 / 150)
    assert ratios.loc[(16, 8), "flops_ratio"] == pytest.approx(2 / 3)
    assert ratios.loc[(16, 8), "relative_difference"] == pytest.approx((2 / 3) / (2 / 3 + 16 / 150) - 1)
    assert ratios["step_ratio"].tolist() == [0.9] * 3 + [1.0] * 3
    assert ratios["memory_ratio"].tolist() == [0.5] * 6
    assert [name for name, _ in each_setting(ratios.reset_index())] == ["tiny batch_size 8", "tiny batch_size 16"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "dora"}, "model tiny: method = 'dora'; allowed: fullft, lora"),
        ({"rank": pd.NA}, "model tiny: rank = missing; allowed: whole numbers from 1 up for lora"),
        ({"linear_flops": 0.0}, "model tiny: linear_flops = 0.0; allowed: numbers above 0"),
        ({"step_s": -1.0}, "model tiny: step_s = -1.0; allowed: numbers above 0"),
        ({"effective_width": math.inf}, "model tiny: effective_width = inf; allowed: numbers above 0"),
        ({"rank": 8}, "the compute table has two rows of tiny with batch_size 8, sequence_length 128, device cpu, "),
    ],
)
def test_a_bad_compute_table_is_refused(change, reason):
    compute = compute_table()
    for column, value in change.items():
        compute.loc[3, column] = value
    with pytest.raises(UserError, match=reason):
        flops_ratio(compute)
    with pytest.raises(UserError, match=reason):
        judged("G1", compute=compute)


def test_flops_of_a_point_are_those_of_its_tokens():
    runs, curves = world()
    points = loss_by_flops(runs, curves)
    assert points["step"].min() == 1
    of_fullft = points[points["method"] == "fullft"]
    np.testing.assert_allclose(of_fullft["flops"], 3e12 * of_fullft["step"].astype(float) / 128)
    of_16 = points[points["rank"].eq(16).fillna(False)]
    np.testing.assert_allclose(of_16["flops"], 0.7 * 3e12 * of_16["step"].astype(float) / 128)


def test_a_run_that_diverged_counts_by_its_own_tokens():
    # It stopped after a quarter, and spent a quarter.
    runs, curves = world({16: {"diverges_from": 1e-2}})
    stopped = runs["status"] == "diverged"
    for column in ("train_tokens", "train_flops"):
        runs[column] = runs[column].astype(float).where(~stopped, runs[column].astype(float) / 4)
    points = loss_by_flops(runs, curves)
    of_16 = points[points["rank"].eq(16).fillna(False)]
    np.testing.assert_allclose(of_16["flops"], 0.7 * 3e12 * of_16["step"].astype(float) / 128)


@given(
    shift=st.floats(0.3, 3),
    offset=st.floats(-1, 1),
    flops=st.lists(st.floats(1, 1e6), min_size=2, max_size=12, unique=True),
)
def test_curves_linear_in_log_flops_have_their_exact_gap(shift, offset, flops):
    """A curve is the other at `shift` times the FLOPs, plus `offset`; the gap is the same wherever both have points."""
    of_arm = {"model": "m", "dataset": "d", "method": "lora", "rank": 8}
    other = of_arm | {"rank": 16}
    points = pd.DataFrame(
        [of_arm | {"flops": f * shift, "value": 5 - math.log(f) + offset} for f in flops]
        + [other | {"flops": f, "value": 5 - math.log(f)} for f in flops]
    )
    gaps = equal_flops_gap(points, of_arm, other)
    low, high = max(1, shift) * min(flops), min(1, shift) * max(flops)
    if low >= high:
        assert gaps.empty
        return
    np.testing.assert_allclose(gaps["gap"], offset + math.log(shift), atol=1e-9)
    assert gaps["flops"].iloc[0] == pytest.approx(math.sqrt(low * high))
    assert gaps["flops"].iloc[-1] == pytest.approx(high)
    np.testing.assert_allclose(
        equal_flops_gap(points, other, of_arm)["gap"].to_numpy(), -gaps["gap"].to_numpy(), atol=1e-9
    )


def test_no_point_between_the_given_ones_is_further_apart():
    runs, curves = world({16: {"leaves_at": 32}})
    points = loss_by_flops(runs, curves)
    arms = {key["rank"]: key for key, _ in each_arm(points)}
    gaps = equal_flops_gap(points, arms[16], arms[None])
    fine = np.geomspace(gaps["flops"].iloc[0], gaps["flops"].iloc[-1], 1000)
    losses = []
    for rank in (16, None):
        of_arm = points[points["rank"].eq(16).fillna(False) if rank else points["rank"].isna()]
        losses.append(np.interp(np.log(fine), np.log(of_arm["flops"].to_numpy(float)), of_arm["value"].to_numpy(float)))
    apart = losses[0] - losses[1]
    assert gaps["gap"].max() >= apart.max() - 1e-12
    assert gaps["gap"].min() <= apart.min() + 1e-12
    assert len(gaps) > 4
