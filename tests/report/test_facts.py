"""Facts, their verdicts, and the headline."""

from __future__ import annotations

from lorabench.report.facts import Fact, facts, headline, in_order

from ..handmade import claims_table, make_claim


def test_a_fact_counts_once_with_its_worst_verdict():
    claims = claims_table(
        [
            make_claim("B1", "confirmed", fact="ratio"),
            make_claim("B3", "not tested"),
            make_claim("B5", "contradicted", fact="ratio"),
            make_claim("B9", "inconclusive", fact="ratio", kind="opinion"),
            make_claim("B10", "setting not met", fact="RL"),
            make_claim("F2", "confirmed", fact="RL", kind="prediction"),
            make_claim("B11", "confirmed", fact="ratio", kind="count"),
        ]
    )
    assert facts(claims) == [
        Fact("empirical claim", "ratio", "contradicted", ("B1", "B5", "B9")),
        Fact("empirical claim", "fact of B3", "not tested", ("B3",)),
        Fact("empirical claim", "RL", "confirmed", ("B10", "F2")),
        Fact("count", "ratio", "confirmed", ("B11",)),
    ]
    assert list(in_order(claims)["claim_id"]) == ["B1", "B5", "B9", "B3", "B10", "F2", "B11"]


def test_headline_counts_empirical_claims_derivations_and_counts_apart():
    claims = claims_table(
        [
            make_claim("A1", "confirmed"),
            make_claim("A2", "inconclusive", fact="same"),
            make_claim("A3", "inconclusive", fact="same"),
            make_claim("F8", "setting not met", kind="prediction"),
            make_claim("C4", "confirmed", kind="derivation"),
            make_claim("C5", "confirmed", kind="derivation"),
            make_claim("E6", "contradicted", kind="count"),
        ]
    )
    assert headline(claims) == (
        "4 empirical claims about 3 facts: 1 confirmed, 1 inconclusive, 1 setting not met; "
        "2 derivations: 2 confirmed; 1 count: 1 contradicted"
    )
