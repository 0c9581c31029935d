"""Claims G1 to G3, and the numbers behind them, on tables whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest

from ..handmade.sft import LRS, arm, tables
from . import jitter, judged, verdict_is

NOISE = 5e-4
BASE = 3.0
STEPS = 128
FULLFT_FLOPS = 3e12

# In steps all arms learn alike; in FLOPs LoRA up to rank 16 spends 0.7 of what FullFT does.
WORLD = {
    None: {"optimum": 3.2e-4, "train_flops": FULLFT_FLOPS},
    4: {"optimum": 3.3e-3, "train_flops": 0.68 * FULLFT_FLOPS},
    16: {"optimum": 3.2e-3, "train_flops": 0.7 * FULLFT_FLOPS},
    64: {"optimum": 3.3e-3, "train_flops": 1.4 * FULLFT_FLOPS},
}


def world(changes=None, hidden_size=128, slow=0.0, **every):
    """Make runs whose loss falls by 0.2 nats with each doubling of the steps; FullFT's in training is `slow` higher."""
    changes = changes or {}
    every |= {"hidden_size": hidden_size}
    runs, curves = tables(arm(rank, **(own | every | changes.get(rank, {}))) for rank, own in WORLD.items())
    runs["final_test_nll"] += [jitter(run_id, NOISE) for run_id in runs["run_id"]]
    validation = 2.0 - 0.2 * np.log2(curves["step"].clip(1).astype(float) / STEPS)
    curves = curves.assign(value=validation.where(curves["step"] > 0, BASE))
    return runs, pd.concat([curves, trained(runs, slow)])


def trained(runs, slow):
    rows = []
    for run in runs[runs["status"] == "done"].to_dict("records"):
        for step in range(1, STEPS + 1):
            # A step's loss is measured after the updates before it.
            value = 2.0 - 0.2 * math.log2(max(step - 1, 0.5) / STEPS) + (slow if run["method"] == "fullft" else 0.0)
            point = {"run_id": run["run_id"], "step": step, "examples": step, "tokens": 1600 * step}
            # Batches differ by much more than the arms do, and are the same for all arms.
            value += jitter(f"batch {run['seed']} {step}", 0.1) + jitter(f"{run['run_id']} {step}", NOISE)
            rows.append(point | {"split": "train", "metric": "nll", "value": value})
    return pd.DataFrame(rows).astype({"step": "Int64"})


def compute_table(ranks=(1, 8, 64), **columns):
    """Make rows whose FLOPs follow the formula exactly; LoRA takes 0.9 of the time and half of the memory."""
    rows = [("fullft", None, None, 3e9, 1.0, 1000)]
    rows += [("lora", rank, "all", 3e9 * (2 / 3 + 2 * rank / 150), 0.9, 500) for rank in ranks]
    names = ["method", "rank", "placement", "linear_flops", "step_s", "peak_mem_bytes"]
    about = {"model": "tiny", "batch_size": 8, "sequence_length": 128, "effective_width": 150.0, "total_flops": 4e9}
    table = pd.DataFrame(rows, columns=names).assign(**about, device="cpu", threads=1)
    return table.astype({"rank": "Int64", "peak_mem_bytes": "Int64"}).assign(**columns)


def changed(compute, factor):
    """Change the counted FLOPs of rank 8."""
    flops = compute["linear_flops"]
    return compute.assign(linear_flops=flops.mask(compute["rank"].eq(8).fillna(False), flops * factor))


def test_g1_is_confirmed_where_every_count_is_the_formula():
    claim = judged("G1", compute=compute_table())
    assert (claim["kind"], claim["verdict"]) == ("count", "confirmed")
    assert claim["ci_low"] == claim["ci_high"] == claim["estimate"] == pytest.approx(0, abs=1e-12)
    assert "r8 0.7733 (formula 0.7733), r64 1.5200" in claim["reason"]
    assert "more FLOPs than FullFT at r64" in claim["reason"]
    # Time is reported but not judged.
    assert judged("G1", compute=compute_table(step_s=[1.0, 5.0, 5.0, 5.0]))["verdict"] == "confirmed"


def test_g1_is_contradicted_by_one_rank_of_one_setting_and_open_without_a_count():
    larger = changed(compute_table(batch_size=16), 1.011)
    larger["linear_flops"] *= 2
    claim = judged("G1", compute=pd.concat([compute_table(), larger]))
    assert (claim["verdict"], claim["estimate"]) == ("contradicted", pytest.approx(0.011))
    assert claim["reason"].startswith("tiny batch_size 16: ")
    table = compute_table()
    for known, ranks in (
        (table[table["method"] == "lora"], "r1, r8, r64"),
        (changed(table, math.nan), "r8"),
    ):
        verdict_is(judged("G1", compute=known), "inconclusive", f"no count of FullFT or LoRA for {ranks}")


def test_g3_reports_memory_and_neither_is_tested_without_the_table():
    claim = judged("G3", compute=compute_table())
    verdict_is(claim, "not tested", "FullFT / LoRA: tiny r1 2.00, tiny r8 2.00, tiny r64 2.00")
    assert math.isnan(claim["estimate"])
    few = compute_table().drop(columns=["rank", "linear_flops"])
    for compute, reason in ((None, "no table compute"), (few, "the compute table has no column rank, linear_flops")):
        claims = judged(["G1", "G3"], compute=compute)
        assert claims["verdict"].tolist() == ["not tested"] * 2
        assert claims["reason"].str.contains(reason).all()


# LoRA has spent its FLOPs when FullFT has done 0.7 of its steps.
AHEAD = 0.2 * math.log2(1 / 0.7)


def test_g2_is_confirmed_where_lora_is_ahead_at_equal_flops():
    runs, curves = world()
    claim = judged("G2", runs, curves)
    assert claim["verdict"] == "confirmed"
    assert claim["estimate"] == pytest.approx(AHEAD, abs=4 * NOISE)
    assert claim["margin_low"] == pytest.approx(0.018, abs=3e-4)
    assert "FullFT - LoRA r16 at the FLOPs of LoRA = 0.10" in claim["reason"]
    assert claim["n_runs"] == 6


def test_g2_is_contradicted_where_lora_is_not_ahead_in_the_later_half():
    assert judged("G2", *world(slow=-AHEAD + 0.005))["verdict"] == "right sign, below the margin"
    dearer = world({16: {"train_flops": 1.4 * FULLFT_FLOPS}})  # alike in steps
    assert judged("G2", *dearer)["verdict"] == "contradicted"
    # LoRA is far behind up to step 8, of 128, and ahead later.
    runs, curves = world()
    slow = curves["run_id"].str.contains("lora-16") & curves["step"].le(8)
    assert judged("G2", runs, curves.assign(value=curves["value"] + slow * 0.5))["verdict"] == "confirmed"


def test_g2_is_left_open_and_needs_flops_and_curves():
    runs, curves = world()
    # LoRA's seeds differ by much from FullFT's.
    seeds = curves["run_id"].map(runs.set_index("run_id")["seed"]).map({0: 0.0, 1: 0.3, 2: -0.3}).astype(float)
    of_lora = curves["run_id"].str.contains("lora-16") & curves["split"].eq("train")
    unsure = curves.assign(value=curves["value"] + seeds.where(of_lora, 0.0))
    for given, reason in (
        ((runs, unsure), "3 seeds, in steps"),
        (world({16: {"lrs": LRS[:4]}}), "LoRA r16: best LR at the edge of its grid"),
        (world(hidden_size=16), "no runs of LoRA up to rank 2 (hidden size 16)"),
    ):
        verdict_is(judged("G2", *given), "inconclusive", reason)
    verdict_is(judged("G2", runs.drop(columns="train_flops"), curves), "not tested", "no column train_flops")
    verdict_is(judged("G2", runs, curves.drop(columns="tokens")), "not tested")
