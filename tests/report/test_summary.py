"""The tables of the report: their numbers are those of the fits and of the engine."""

import math

import pandas as pd
import pytest

from lorabench.analysis.comparison import Judging, comparisons
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.report.other_margins import UNTESTED, turned, verdicts_by_margin
from lorabench.report.summary import experiment
from lorabench.store.schemas import VERDICTS_BY_MARGIN
from lorabench.store.tables import Tables

from ..handmade import claims_table, make_claim
from ..handmade.sft import arm, tables
from .conftest import at_twice_the_margins


def described(arms):
    runs, curves = tables(arms)
    return experiment("rank", runs.assign(experiments=[["rank"]] * len(runs)), Judging())["arms"], runs, curves


def test_the_optimum_of_a_row_is_that_of_the_fit():
    rows, runs, curves = described([arm(optimum=3e-4), arm(8, optimum=3e-3, floor=2.1)])
    [comparison] = comparisons(runs, curves)
    for row, label in zip(rows, ("FullFT", "LoRA r8"), strict=True):
        minimum, optimum = comparison.fit.minima[label], comparison.fit.optima[label]
        assert row["lr"] == pytest.approx(math.exp(optimum.value))
        assert [row["best"], row["best_low"], row["best_high"]] == pytest.approx([minimum.value, *minimum.interval()])
        assert row["resolved"]
    assert row["ratio_resolved"]
    assert row["ratio"] == pytest.approx(math.exp(comparison.fit.log_ratio("LoRA r8", "FullFT").value))


ARMS = {None: {"optimum": 4e-4}, **{rank: {"optimum": 3.3e-3, "floor": 2.02} for rank in (4, 64)}}
"""LoRA ends 0.02 nats above full fine-tuning, where the margin is 0.058, and its optimal LR is 8.25 times as high."""


def test_a_claim_turns_where_its_margin_passes_the_difference():
    # LRs so near to each other leave little doubt about the shape of the loss.
    factors = [1.1 * 1.8**step for step in range(-2, 3)]
    given = Tables(
        *tables(
            arm(rank, lrs=[factor * settings["optimum"] for factor in factors], **settings)
            for rank, settings in ARMS.items()
        )
    )
    chosen = [claim for claim in CLAIMS if claim.id in ("A7", "B1", "F1")]
    judged = judge_claims(given, chosen, DEFAULT_MARGINS)
    found = verdicts_by_margin(given, judged, DEFAULT_MARGINS)
    assert list(found.columns) == VERDICTS_BY_MARGIN.names
    verdicts = found.pivot(index="claim_id", columns="factor", values="verdict")
    assert list(verdicts.columns) == [0.25, 0.5, 1, 2, 4]
    own = judged.set_index("claim_id")["verdict"]
    assert verdicts[1.0].to_dict() == own[~own.isin(UNTESTED)].to_dict()
    assert verdicts.loc["A7"].tolist() == ["contradicted", *["confirmed"] * 4]
    margins = found[found["claim_id"] == "A7"]["margin_high"].tolist()
    assert margins == pytest.approx([0.058 * factor for factor in (0.25, 0.5, 1, 2, 4)], rel=0.01)
    # 8.25 is 10 within a factor of 1.27, and not within 1.13.
    assert verdicts.loc["B1"].tolist() == ["contradicted", *["confirmed"] * 4]
    # A margin of a whole accuracy could not be stated.
    wide = DEFAULT_MARGINS.model_copy(update={"reward": 0.3})
    assert 4 not in set(verdicts_by_margin(given, judged[:1], wide)["factor"])


def test_verdicts_of_an_earlier_table_are_not_shown():
    judged = claims_table([make_claim("A7"), make_claim("B1")])
    by_margin = at_twice_the_margins(judged)
    assert turned(by_margin, judged)["stay"] == ["A7", "B1"]
    assert turned(by_margin, judged.assign(verdict="inconclusive")) is None
    assert turned(pd.DataFrame(), judged) is None
