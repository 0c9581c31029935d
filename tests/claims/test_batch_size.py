"""Claims D1 to D5 on tables whose answer is known."""

import math

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


def world(gap=None, rank_gap=None, fullft=None, halfway=None, steps=None, noise=NOISE, **settings):
    """Make FullFT and LoRA at several batch sizes, in one pass over the same data; `settings` change all LoRA arms."""
    gap, fullft, halfway = GAP | (gap or {}), FULLFT | (fullft or {}), HALFWAY | (halfway or {})
    length = {size: (steps or {}).get(size, EXAMPLES // size) for size in gap}
    arms = []
    for size in gap:
        arms.append(arm(optimum=4e-4, floor=fullft[size], batch_size=size, steps=length[size]))
        for rank in (4, 64):
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
    grows = GAP[128] * (1 - HALFWAY[128]) - GAP[8] * (1 - HALFWAY[8])
    known = [GAP[128] - GAP[8], grows, 0.0, FULLFT[128] - FULLFT[8]]
    assert confirmed.loc[IDS, "estimate"].tolist() == pytest.approx(known, abs=4 * NOISE)
    assert confirmed.loc[["D1", "D4"], "margin_low"].tolist() == pytest.approx([MARGIN, MARGIN], abs=3e-4)
    assert confirmed.loc["D1", "margin_rule"].endswith("2% of the gain from the base to FullFT (0.892 nats) at batch 8")
    assert confirmed.loc["D1", "n_runs"] == 3 * 3 * (len(LRS) + 2)


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("D1", {"rank_gap": {(64, 128): -0.11}}),  # one rank is enough
        ("D2", {"halfway": {128: 3.0}}),
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
    for _, row in judged(claims, *world(**changes)).iterrows():
        verdict_is(row, "inconclusive")
        assert remedy in row["would_decide"]


def test_missing_curves_and_arms():
    runs, curves = world()
    assert judged(["D1", "D2"], runs, curves[curves["step"] < 20])["verdict"].tolist() == ["confirmed", "not tested"]
    r64 = runs["rank"].eq(64).fillna(False)
    few = judged("D1", runs[~(r64 & runs["batch_size"].eq(128))], curves)
    verdict_is(few, "inconclusive", "no runs of LoRA r64 at batch 128")
    verdict_is(judged("D1", runs[runs["method"] == "lora"], curves), "inconclusive", "no runs of FullFT")
    assert judged(["D1", "D3"], runs[~r64], curves)["verdict"].tolist() == ["confirmed", "not tested"]


def test_batch_sizes_that_saw_other_amounts_of_data_decide_nothing():
    for _, row in judged(IDS, *world(steps={128: 64})).iterrows():
        verdict_is(row, "inconclusive", "batch 128 8,192")
    # As far as whole steps allow, it is the same data.
    assert judged("D1", *world(steps={8: 480}))["verdict"] == "confirmed"
