"""The shipped sources are judged by the same claims; one seed confirms nothing without a named noise."""

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS
from lorabench.errors import UserError
from lorabench.sources.measurements import matrix, measurement_table, read_own, summary_table
from lorabench.sources.source import judge, read_sources, source_folders

from ..conftest import REPOSITORY
from .conftest import COLUMNS

CHOSEN = [claim for claim in CLAIMS if claim.id in ("B1", "B2")]


@pytest.mark.slow
def test_measurements_are_those_of_the_grids():
    sources = read_sources(source_folders())
    table = measurement_table(sources, pd.concat([judge(source) for source in sources], ignore_index=True))
    gap = table[(table["measure"] == "rank_1_gap") & (table["dataset"] == "MATH outcome reward")].iloc[0]
    deviations = (0.022, 0.071, 0.019, 0.031, 0.040, 0.029)
    pooled = math.sqrt(sum(sd**2 for sd in deviations) / len(deviations))
    assert (gap["value"], gap["error"]) == pytest.approx((0.550 - 0.553, pooled * math.sqrt(2 / 3)))
    [accuracy] = table[table["measure"] == "accuracy_gap"].to_dict("records")
    assert (accuracy["source"], accuracy["value"]) == ("nayyirahsan", pytest.approx(-0.01))
    # Its optimal LRs are those of the training loss, as before, so that its losses are compared too.
    assert set(table.loc[table["source"] == "nayyirahsan", "measure"]) == {"lr_ratio", "loss_gap", "accuracy_gap"}
    # The best LRs of both methods are at the edges of their grids.
    edge = table[(table["study"] == "apertus/Apertus-8B-Instruct-2509") & (table["measure"] == "lr_ratio")].iloc[0]
    assert (edge["counts"], "edge of its grid" in edge["remark"]) == (False, True)
    summary = summary_table(table)
    overall = summary[summary["attribute"] == ""].set_index("measure")
    assert overall.loc["rank_1_gap", "k"] == 4
    # A source with several measurements counts once.
    assert overall.loc["lr_ratio", "k"] == table[table["counts"] & (table["measure"] == "lr_ratio")]["source"].nunique()


def test_a_cell_counts_the_comparisons_of_all_its_sources():
    own = read_own(REPOSITORY / "paper_figures/published/laptop", "laptop")
    nothing = own.iloc[:0].assign(source=None)
    b3 = own[own["claim_id"] == "B3"].assign(verdict="confirmed", n_hold=1, n_parts=1, part_low=1.1, part_high=1.1)
    more = b3.assign(origin="more", n_parts=2, part_low=0.8, part_high=1.3, verdict="contradicted")
    unmet = {"verdict": "setting not met", "n_hold": 0, "n_parts": 0, "part_low": np.nan, "part_high": np.nan}
    several = [more, b3, b3.assign(origin="other", **unmet)]
    [cell] = matrix(nothing, several).to_dict("records")
    assert (cell["verdict"], cell["origin"]) == ("contradicted", "more")
    assert [cell[name] for name in ("n_hold", "n_parts", "part_low", "part_high")] == [2, 3, 0.8, 1.3]


@pytest.mark.parametrize(
    ("remedy", "verdicts", "decides", "lowest"),
    [
        ("longer runs", ["inconclusive", "confirmed"], 1, 0.2),
        ("longer runs", ["inconclusive", "setting not met"], 0, 0.2),
        ("4 seeds", ["inconclusive", "confirmed"], 0, 0.1),
    ],
)
def test_too_short_runs_leave_no_cell_open_that_longer_ones_decide(remedy, verdicts, decides, lowest):
    own = read_own(REPOSITORY / "paper_figures/published/laptop", "laptop")
    a8 = own[own["claim_id"] == "A8"]
    assert a8["would_decide"].item() == "longer runs"
    several = [
        a8.assign(verdict=verdict, would_decide=remedy if verdict == "inconclusive" else None, part_low=low)
        for verdict, low in zip(verdicts, (0.1, 0.2), strict=True)
    ]
    [cell] = matrix(own.iloc[:0].assign(source=None), several).to_dict("records")
    # Estimates of runs that are too short don't count.
    assert (cell["verdict"], cell["part_low"]) == (verdicts[decides], lowest)


def test_a_source_of_ones_own_stands_next_to_the_shipped_ones(source):
    folder = source(noise={"sd": 0.001, "dof": 9, "source": "made-up repeats"})
    assert source_folders(folder)[-1] == source_folders(folder.parent)[-1] == folder
    [own] = read_sources([folder])
    row = judge(own, CHOSEN).set_index("claim_id").loc["B1"]
    assert (row["verdict"], row["doubts"], row["estimate"]) == ("confirmed", "one seed", pytest.approx(10))
    assert "seed noise from made-up repeats" in row["reason"]
    [alone] = read_sources([source()])
    assert judge(alone, CHOSEN).set_index("claim_id").loc["B1", "verdict"] == "inconclusive"


ACCURACIES = f"{COLUMNS.removesuffix('final_test_nll')}base_reward,final_reward"


def accuracies(full: float, lora: float) -> list[str]:
    """Return runs with two seeds at three LRs, with the given accuracies at the best, and LoRA r16 at one LR."""
    arms = [("fullft", "", 1e-5, full), ("lora", 8, 1e-4, lora)]
    cells = [(method, rank, lr * factor, best - loss) for method, rank, lr, best in arms
             for factor, loss in ((1, 0.03), (2, 0.0), (4, 0.03))]  # fmt: skip
    cells.append(("lora", 16, 2e-4, 0.4))
    return [
        f"{method}{rank}-{lr}-{seed},m,d,sft,{method},{rank},all,8,200,done,{lr},{seed},0.3,{accuracy + noise:.4f}"
        for method, rank, lr, accuracy in cells
        for seed, noise in enumerate((0.002, -0.002, 0.0005))
    ]


def test_accuracies_of_supervised_runs_are_judged_as_error_rates(source):
    # Rank 16, at one LR, is not compared.
    [own] = read_sources([source(accuracies(0.8, 0.7), ACCURACIES, outcome="accuracy")])
    claims = judge(own, CHOSEN)
    row = claims.set_index("claim_id").loc["B2"]
    assert (row["verdict"], row["unit"]) == ("contradicted", "error rate")
    assert row["estimate"] == pytest.approx(0.1, abs=1e-3)
    assert row["margin_high"] == 0.02
    assert "LoRA r8 - FullFT" in row["reason"]
    measured = measurement_table([own], claims).set_index("measure")
    # Without losses, learning rates are those of the error rates.
    assert measured.loc["lr_ratio", "value"] == pytest.approx(math.log(10))
    assert measured.loc["accuracy_gap", "value"] == pytest.approx(-0.1)
    assert "loss_gap" not in measured.index
    with pytest.raises(UserError, match="final_reward = missing"):
        read_sources([source(outcome="accuracy")])
