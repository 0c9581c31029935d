"""The verdicts by other margins are those that the engine gives with these margins, on tables whose answer is known."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.report.other_margins import FACTORS, UNTESTED, scaled, turned, verdicts_by_margin
from lorabench.store.layout import Layout
from lorabench.store.schemas import VERDICTS_BY_MARGIN
from lorabench.store.tables import Tables

from ..handmade import claims_table, make_claim
from ..handmade.sft import arm, tables
from .conftest import at_twice_the_margins

ARMS = {None: {"optimum": 4e-4}, **{rank: {"optimum": 3.3e-3, "floor": 2.02} for rank in (4, 64)}}
"""LoRA ends 0.02 nats above full fine-tuning, where the margin is 0.058, and its optimal LR is 8.25 times as high."""


def chosen(*ids):
    return [claim for claim in CLAIMS if claim.id in ids]


def test_a_claim_turns_where_its_margin_passes_the_difference():
    given = Tables(*tables(arm(rank, **settings) for rank, settings in ARMS.items()))
    judged = judge_claims(given, chosen("A7", "B1", "B3", "F1"), DEFAULT_MARGINS)
    found = verdicts_by_margin(given, judged, DEFAULT_MARGINS)
    assert list(found.columns) == VERDICTS_BY_MARGIN.names
    verdicts = found.pivot(index="claim_id", columns="factor", values="verdict")
    assert list(verdicts.columns) == sorted([1.0, *FACTORS])
    own = judged.set_index("claim_id")["verdict"]
    assert verdicts[1.0].to_dict() == own[~own.isin(UNTESTED)].to_dict()
    assert verdicts.loc["A7"].tolist() == ["contradicted", *["confirmed"] * 4]
    margins = found[found["claim_id"] == "A7"]["margin_high"].tolist()
    assert margins == pytest.approx([0.058 * factor for factor in (0.25, 0.5, 1, 2, 4)], rel=0.01)
    # 8.25 is 10 within a factor of 1.27, and not within 1.13.
    assert verdicts.loc["B1"].tolist() == ["contradicted", *["confirmed"] * 4]
    assert verdicts.loc["B3"].tolist() == ["confirmed"] * 5


def test_the_page_shows_what_turns_without_a_script(report, rows):
    assert 'id="margins"' not in report(rows).source
    page = report(rows, by_margin=at_twice_the_margins)
    judged = pd.read_parquet(Layout.of("mine.yaml").tables() / "claims.parquet").set_index("claim_id")["verdict"]
    turns = judged.index[judged == "inconclusive"]
    section = page.section("margins")
    assert len(turns)
    assert f"{len(turns)} of {(~judged.isin(UNTESTED)).sum()} verdicts turn" in section.text
    shown = re.findall(r'<tr data-claim="(.+?)">(.+?)</tr>', section.source, re.DOTALL)
    assert [claim_id for claim_id, _ in shown] == list(turns)
    for _, row in shown:
        assert re.findall(r'class="([^"]*)" data-times="(.).*?data-verdict="(.*?)"', row) == [
            ("now same", "1", "inconclusive"),
            ("", "2", "confirmed"),
        ]
    # The control works by a script only, which shows it.
    assert re.search(r'id="margin" hidden>', section.source)


def test_verdicts_of_an_earlier_table_are_not_shown():
    judged = claims_table([make_claim("A7"), make_claim("B1")])
    by_margin = at_twice_the_margins(judged)
    assert turned(by_margin, judged)["stay"] == ["A7", "B1"]
    assert turned(by_margin, judged.assign(verdict="inconclusive")) is None
    assert turned(pd.DataFrame(), judged) is None


def test_margins_that_a_preset_could_not_state_are_left_out():
    assert scaled(DEFAULT_MARGINS, 4)
    assert scaled(DEFAULT_MARGINS.model_copy(update={"reward": 0.3}), 4) is None
