"""The verdicts by other margins are those that the engine gives with these margins, on tables whose answer is known."""

from __future__ import annotations

import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.report.other_margins import UNTESTED, turned, verdicts_by_margin
from lorabench.store.schemas import VERDICTS_BY_MARGIN
from lorabench.store.tables import Tables

from ..handmade import claims_table, make_claim
from ..handmade.sft import arm, tables
from .conftest import at_twice_the_margins

ARMS = {None: {"optimum": 4e-4}, **{rank: {"optimum": 3.3e-3, "floor": 2.02} for rank in (4, 64)}}
"""LoRA ends 0.02 nats above full fine-tuning, where the margin is 0.058, and its optimal LR is 8.25 times as high."""


def test_a_claim_turns_where_its_margin_passes_the_difference():
    given = Tables(*tables(arm(rank, **settings) for rank, settings in ARMS.items()))
    chosen = [claim for claim in CLAIMS if claim.id in ("A7", "B1", "B3", "F1")]
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
