"""Published numbers are those of the files, and the optima of a published sweep of LoRA are fitted."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.analysis import published
from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.optima import ratio_interval
from lorabench.claims.judge import CLAIMS


def test_numbers_are_those_of_the_files():
    estimates = published.estimates_by_claim()
    assert estimates["B1"].startswith("10 (Qwen3-4B")
    assert estimates["B4"].startswith("0.48 (")
    assert estimates["A7"].startswith("0.0000 nats")
    assert estimates["E2"].startswith("0.0034 nats")
    # The ratio of the vertices of the parabolas through the minima: 5.012e-4 / 3.001e-4.
    assert estimates["B3"].startswith("1.67 from rank 4 to 128 (Llama-3.1-8B")
    assert set(estimates) <= {claim.id for claim in CLAIMS}


NOISE = Noise(0.0004, 10, "the repeats at LR 1e-3")


def test_optimum_by_rank():
    sweep = pd.read_csv(published.REFERENCE / "tinker_sft_sweep.csv")
    about = {"dataset": "tulu3", "method": "lora", "placement": "all", "batch_size": 128, "status": "done"}
    sweep = sweep[sweep["model"] == "meta-llama/Llama-3.1-8B"]
    # A repeated cell is another run of the same settings.
    seed = sweep.groupby(["rank", "lr"]).cumcount()
    loss, ids = sweep["test_nll"], [f"row-{row}" for row in sweep.index]
    runs = sweep.assign(**about, seed=seed, run_id=ids, final_test_nll=loss, final_valid_nll=loss)
    [comparison] = comparisons(runs, pd.DataFrame(), Judging(noise=NOISE))
    fit = comparison.fit
    # A parabola by numpy.polyfit through each rank's minimum alone gives 3.0, 3.7, 5.5 and 5.0 times 1e-4.
    by_rank = {"LoRA r4": 3.0e-4, "LoRA r16": 3.7e-4, "LoRA r64": 5.5e-4, "LoRA r128": 5.0e-4}
    assert {label: math.exp(optimum.value) for label, optimum in fit.optima.items()} == pytest.approx(by_rank, rel=0.1)
    assert all(fit.resolved.values())
    low, high = ratio_interval(fit.log_ratio("LoRA r128", "LoRA r4"))
    assert 1.3 < low < high < 1.9
