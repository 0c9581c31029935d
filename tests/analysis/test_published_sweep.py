"""Claims on a published sweep (tinker-cookbook): LoRA only, hardly any repeats, and one evaluation set."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from lorabench.analysis.arms import ARM, OPTIONAL
from lorabench.analysis.comparison import Judging
from lorabench.analysis.loss_fit import Noise
from lorabench.analysis.noise import seed_noise
from lorabench.analysis.optima import lr_optima
from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.store.tables import Tables, with_stand_ins

SWEEP = Path(__file__).parents[2] / "paper_figures" / "reference" / "tinker_sft_sweep.csv"
NOISE = Noise(0.0004, 10, "the repeats at LR 1e-3")
LLAMA = "meta-llama/Llama-3.1-8B"


@pytest.fixture(scope="module")
def runs():
    sweep = pd.read_csv(SWEEP)
    sweep = sweep.assign(
        dataset="tulu3",
        method="lora",
        placement="all",
        batch_size=128,
        status="done",
        final_test_nll=sweep["test_nll"],
        # A repeated cell is another run of the same settings.
        seed=sweep.groupby(["model", "rank", "lr"]).cumcount(),
    )
    return sweep.assign(run_id=[f"row-{row}" for row in sweep.index])


def judged(runs, **options):
    """Judge claims on runs that have only the columns that every claim needs, and no validation loss."""
    needed = [*(name for name in ARM if name not in OPTIONAL), "run_id", "lr", "seed", "status", "final_test_nll"]
    chosen = [claim for claim in CLAIMS if claim.id in ("A7", "A8", "B1", "B2", "B3", "B4", "B5")]
    return judge_claims(Tables(with_stand_ins(runs[needed]), pd.DataFrame()), chosen, **options).set_index("claim_id")


def test_optimum_by_rank(runs):
    optima = lr_optima(runs.assign(final_valid_nll=runs["final_test_nll"]), Judging(noise=NOISE))
    optima = optima.set_index(["model", "rank"])
    of_llama = optima.loc[LLAMA, "lr_opt"]
    # A parabola by numpy.polyfit through each rank's minimum alone gives 3.0, 3.7, 5.5 and 5.0 times 1e-4.
    assert of_llama.to_dict() == pytest.approx({4: 3.0e-4, 16: 3.7e-4, 64: 5.5e-4, 128: 5.0e-4}, rel=0.1)
    assert optima.loc[LLAMA, "resolved"].all()
    edge = optima["edge"].groupby(level="model").mean()
    assert list(edge.index[edge == 1]) == ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"]


def test_sigma_of_repeated_cells(runs):
    noise = seed_noise(runs.assign(final_valid_nll=runs["final_test_nll"])).set_index("model")
    # Llama-3.1-8B is repeated at LR 4e-5 only; the repeats of Qwen3-30B at 3e-3 differ much more.
    assert 5e-5 < noise.loc[LLAMA, "sigma"] < 2e-4
    assert noise.loc["Qwen/Qwen3-30B-A3B-Base", "sigma"] > 1e-3
    cell = runs[(runs["model"] == LLAMA) & (runs["rank"] == 4) & (runs["lr"] == 4e-5)]
    assert sorted(cell["test_nll"]) == [0.612, 0.6121]


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


def test_without_full_fine_tuning_no_claim_about_it_gets_a_verdict(runs):
    rows = judged(runs, noise=NOISE)
    assert rows.loc[["A7", "A8", "B1", "B2"], "verdict"].isin(["inconclusive", "not tested"]).all()
    # Some models are at the edge of their grids or have no rank 1, which leaves both open over all models.
    assert rows.loc[["B3", "B4"], "verdict"].tolist() == ["inconclusive"] * 2
    assert "edge of its grid" in rows.loc["B3", "reason"]
    assert rows.loc["B5", "verdict"] == "not tested"
    assert "no column family, hidden_size" in rows.loc["B5", "reason"]
