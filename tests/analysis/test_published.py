"""Published numbers are those of the files, and claims can be judged on a published sweep of LoRA."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from lorabench.analysis import published
from lorabench.analysis.arms import ARM, OPTIONAL
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.loss_fit import Noise
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.store.tables import Tables, with_stand_ins


def test_numbers_are_those_of_the_files():
    estimates = published.estimates_by_claim()
    assert estimates["B1"].startswith("10 (Qwen3-4B")
    assert estimates["B4"].startswith("0.48 (")
    assert estimates["A7"].startswith("0.0000 nats")
    assert estimates["E2"].startswith("0.0034 nats")
    # The ratio of the vertices of the parabolas through the minima: 5.012e-4 / 3.001e-4.
    assert estimates["B3"].startswith("1.67 from rank 4 to 128 (Llama-3.1-8B")
    assert set(estimates) <= {claim.id for claim in CLAIMS}


SWEEP = Path(__file__).parents[2] / "paper_figures" / "reference" / "tinker_sft_sweep.csv"
NOISE = Noise(0.0004, 10, "the repeats at LR 1e-3")
LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def runs():
    sweep = pd.read_csv(SWEEP)
    about = {"dataset": "tulu3", "method": "lora", "placement": "all", "batch_size": 128, "status": "done"}
    # A repeated cell is another run of the same settings.
    seed = sweep.groupby(["model", "rank", "lr"]).cumcount()
    ids = [f"row-{row}" for row in sweep.index]
    return sweep.assign(**about, seed=seed, run_id=ids, final_test_nll=sweep["test_nll"])


def judged(runs, **options):
    """Judge claims on runs that have only the columns that every claim needs, and no validation loss."""
    needed = [*(name for name in ARM if name not in OPTIONAL), "run_id", "lr", "seed", "status", "final_test_nll"]
    chosen = [claim for claim in CLAIMS if claim.id in ("A7", "A8", "B1", "B2", "B3", "B4", "B5")]
    return judge_claims(Tables(with_stand_ins(runs[needed]), pd.DataFrame()), chosen, **options).set_index("claim_id")


def test_a_shift_of_the_optimum_is_judged_by_noise_from_elsewhere(runs):
    llama = runs[runs["model"] == LLAMA]
    assert judged(llama).loc["B3", "verdict"] == "inconclusive"
    row = judged(llama, noise=NOISE).loc["B3"]
    assert row["verdict"] == "confirmed"
    # From rank 4 to 128 by a factor of 1.5 to 1.9.
    assert 1.5 < row["ci_low"] < row["estimate"] < row["ci_high"] < 1.9
    assert "seed noise from the repeats at LR 1e-3" in row["reason"]
    assert row["reason"].endswith("one evaluation set: the LR was picked on the loss that is reported")
    assert math.isfinite(row["detectable"])


def test_optimum_by_rank(runs):
    table = runs.assign(final_valid_nll=runs["final_test_nll"])
    for comparison in comparisons(table, pd.DataFrame(), Judging(noise=NOISE)):
        fit = comparison.fit
        edges = {fit.grids[label].edge is not None for label in comparison.rows}
        if "Llama-3.2" in comparison.label:
            assert edges == {True}
        if comparison.label == f"{LLAMA}/tulu3":
            optima = {label: math.exp(optimum.value) for label, optimum in fit.optima.items()}
            # A parabola by numpy.polyfit through each rank's minimum alone gives 3.0, 3.7, 5.5 and 5.0 times 1e-4.
            by_rank = {"LoRA r4": 3.0e-4, "LoRA r16": 3.7e-4, "LoRA r64": 5.5e-4, "LoRA r128": 5.0e-4}
            assert optima == pytest.approx(by_rank, rel=0.1)
            assert all(fit.resolved.values())
