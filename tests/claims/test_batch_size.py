"""Claims D1 to D5 on tables whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from ..handmade.sft import LRS, arm, tables
from . import jitter, judged, verdict_is

IDS = ["D1", "D2", "D3", "D4"]
EXAMPLES = 4096
BASE = 3.0  # the base's NLL
FULLFT = {8: 2.0, 32: 2.05, 128: 2.15}  # final test NLL by batch size
GAP = {8: 0.02, 32: 0.06, 128: 0.12}
HALFWAY = {8: 4.0, 32: 1.2, 128: 1.1}  # gap in the first half of the data, as a multiple of that in the second
MARGIN = 0.02 * (BASE - FULLFT[8] - 0.1)  # the validation NLL is 0.1 above the test NLL
NOISE = 0.0005


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


def test_every_claim_is_confirmed_where_all_hold():
    confirmed = judged([*IDS, "D5"], *world())
    assert confirmed["verdict"].to_dict() == dict.fromkeys(IDS, "confirmed") | {"D5": "not tested"}
    assert not confirmed["reason"].str.contains("nan").any()
    tolerance = {"abs": 4 * NOISE}
    assert confirmed.loc["D1", "estimate"] == pytest.approx(GAP[128] - GAP[8], **tolerance)
    assert confirmed.loc["D3", "estimate"] == pytest.approx(0.0, **tolerance)
    assert confirmed.loc["D4", "estimate"] == pytest.approx(FULLFT[128] - FULLFT[8], **tolerance)
    grows = {size: GAP[size] * (1 - HALFWAY[size]) for size in GAP}
    assert confirmed.loc["D2", "estimate"] == pytest.approx(grows[128] - grows[8], **tolerance)
    assert confirmed.loc[["D1", "D4"], "margin_low"].tolist() == pytest.approx([MARGIN, MARGIN], abs=3e-4)
    assert confirmed.loc["D1", "margin_rule"].endswith("2% of the gain from the base to FullFT (0.892 nats) at batch 8")
    assert confirmed.loc["D1", "n_runs"] == 3 * 3 * (len(LRS) + 2)


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("D1", {"rank_gap": {(64, 128): -0.11}}),  # one rank is enough
        ("D2", {"halfway": {128: 3.0}}),
        ("D2", {"halfway": {8: 1.0}}),
        ("D3", {"rank_gap": {(64, 128): 0.05}}),
        ("D4", {"fullft": {128: 1.9}}),
    ],
)
def test_contradicted_where_it_fails(claim, changes):
    assert judged(claim, *world(**changes))["verdict"] == "contradicted"


@pytest.mark.parametrize(
    ("claims", "changes", "remedy"),
    [
        (IDS, {"offsets": (0.0,)}, "3 seeds (now 1)"),
        (["D1", "D3", "D4"], {"noise": 0.06, "gap": {128: 0.06}, "fullft": {128: 2.06}}, "seeds"),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claims, changes, remedy):
    table = judged(IDS, *world(**changes)).loc[claims]
    for _, row in table.iterrows():
        verdict_is(row, "inconclusive")
        assert remedy in row["would_decide"]


def test_what_test_examples_add_to_the_gap_at_all_batch_sizes_cancels_in_its_growth():
    runs, curves = world()
    hard, own = np.random.default_rng(0).normal(0, 1, (2, 50))

    def width(sign):
        """Return the width of D1's interval where LoRA finds some examples harder, by a sign for each batch size."""
        adds = (runs["batch_size"].map(sign) * (runs["method"] == "lora")).astype(float)
        losses = pd.concat(
            pd.DataFrame({"run_id": run_id, "example": range(50), "loss": 2.0 + hard + 0.1 * add * own, "tokens": 1})
            for run_id, add in zip(runs["run_id"], adds, strict=True)
        )
        row = judged("D1", runs, curves, test_losses=losses)
        return row["ci_high"] - row["ci_low"]

    plain = judged("D1", runs, curves)
    assert width({8: 1, 32: 1, 128: 1}) == pytest.approx(plain["ci_high"] - plain["ci_low"])
    assert width({8: 1, 32: 1, 128: -1}) == pytest.approx(2 * 1.96 * 0.2 * own.std() / math.sqrt(50), rel=0.1)


def test_rank_1_is_left_out_and_large_batches_are_a_condition():
    runs, curves = world(ranks=(1, 4, 64), rank_gap={(1, 8): 0.5})
    assert judged(IDS, runs, curves)["verdict"].tolist() == ["confirmed"] * 4
    runs, curves = world(gap={16: 0.03}, fullft={16: 2.0}, halfway={16: 2.0})
    claims = judged(IDS, runs[runs["batch_size"].lt(128)], curves)
    assert claims["verdict"].tolist() == ["setting not met"] * 4
    assert claims["missing"].str.contains("here 8 to 32, with 128 steps at 32", regex=False).all()
    assert claims.loc["D1", "estimate"] == pytest.approx(GAP[32] - GAP[8], abs=4 * NOISE)


def test_a_rank_that_is_worse_at_every_batch_size_is_no_effect_of_the_batch_size():
    lacking = {(4, size): 0.1 for size in GAP}
    row = judged("D3", *world(rank_gap=lacking))
    assert (row["verdict"], row["estimate"]) == ("confirmed", pytest.approx(0.0, abs=4 * NOISE))
    assert "LoRA r64 - LoRA r4" in row["reason"]
    # Where two ranks are high, low ones are not judged, which may lack more where more is learned.
    three = world(ranks=(4, 16, 64), rank_gap={(4, 8): 0.3})
    claims = judged(IDS, *three)
    assert set(claims["verdict"]) == {"confirmed"}
    assert "LoRA r64 - LoRA r16" in claims.loc["D3", "reason"]
    assert not claims["reason"].str.contains("LoRA r4 ").any()


def test_what_a_seed_does_to_the_change_of_the_gap_at_all_batch_sizes_cancels():
    runs, curves = world()
    at = curves.merge(runs[["run_id", "method", "seed", "batch_size", "steps"]], on="run_id")
    ends = ((at["method"] == "lora") & (at["step"] > at["steps"] * 3 / 4)).to_numpy(float)

    def width(*names):
        """Return the width of D2's interval if the gap at the end varies by the seed and by further columns."""
        keys = at[list(names)].astype(str).agg(" ".join, axis=1)
        row = judged("D2", runs, curves.assign(value=curves["value"] + ends * keys.map(lambda key: jitter(key, 0.02))))
        return row["ci_high"] - row["ci_low"]

    assert width("seed") < 0.2 * width("seed", "batch_size")


def test_what_hangs_on_the_lr_carries_the_error_of_the_optimum():
    runs, curves = world(noise=0.005)
    at = curves.merge(runs[["run_id", "method", "lr", "batch_size", "steps"]], on="run_id")
    train = at["split"].eq("train")
    # No loss is below 0.
    curves = curves.assign(value=curves["value"] + 10 * train)
    late = train & (at["method"] == "lora") & (at["batch_size"] == 128) & (at["step"] > at["steps"] * 3 / 4)
    slope = np.where(late, np.log(at["lr"].astype(float) / 4e-3), 0.0)
    plain, steep = (judged("D2", runs, table) for table in (curves, curves.assign(value=curves["value"] + slope)))
    assert steep["ci_high"] - steep["ci_low"] > 3 * (plain["ci_high"] - plain["ci_low"])


def test_missing_curves_and_arms():
    runs, curves = world()
    for kept in (curves[curves["split"] != "train"], curves[curves["step"] < 20]):
        claims = judged(["D1", "D2"], runs, kept)
        assert claims["verdict"].to_dict() == {"D1": "confirmed", "D2": "not tested"}
    fullft, large = runs["method"].eq("fullft"), runs["batch_size"].eq(128)
    r64 = runs["rank"].eq(64).fillna(False)
    for kept in (runs[~fullft], runs[fullft], runs[~(fullft & large)], runs[~(r64 & large)]):
        assert "confirmed" not in set(judged(["D1", "D2", "D4"], kept, curves)["verdict"])
    reason = judged("D1", runs[~(r64 & large)], curves)["reason"]
    assert reason.endswith("no runs of LoRA r64 at batch 128")
    claims = judged(["D1", "D3"], runs[~r64], curves)
    assert claims["verdict"].to_dict() == {"D1": "confirmed", "D3": "not tested"}


def test_batch_sizes_that_saw_other_amounts_of_data_decide_nothing():
    for _, row in judged(IDS, *world(steps={128: 64})).iterrows():
        verdict_is(row, "inconclusive", "batch 128 8,192")
    # As far as whole steps allow, it is the same data.
    assert judged("D1", *world(steps={8: 480}))["verdict"] == "confirmed"
