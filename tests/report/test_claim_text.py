"""The sentence about a judged claim, and how verdicts are counted."""

import math

from lorabench.report import claim_text

from ..handmade import claims_table, make_claim


def test_a_sentence_says_what_was_measured_and_what_was_asked_for():
    at_least = {"margin_low": 0.01, "margin_high": math.inf, "estimate": 0.03}
    found = "It does not hold for models this small: 0.0300 nats was measured, and at least 0.01 was asked for."
    assert claim_text.sentence(make_claim("B1", "not seen here", **at_least)) == found
    assert claim_text.sentence(make_claim("B1", "inconclusive", would_decide=None)) == "These runs cannot say."
    missing = "runs of 1,000 steps or more (here at most 50 steps; the preset core or paper meets it)"
    about = "These runs cannot say: the claim is about runs of 1,000 steps or more (here at most 50 steps)."
    assert claim_text.sentence(make_claim("B1", "setting not met", missing=missing)) == about
    assert claim_text.verdict(make_claim("B1", p_again=0.7)) == "confirmed, borderline"


def test_a_fact_counts_once_with_its_worst_verdict_and_the_headline_counts_kinds_apart():
    claims = claims_table(
        [
            make_claim("B1", "confirmed", fact="ratio"),
            make_claim("B3", "not tested"),
            make_claim("B5", "contradicted", fact="ratio"),
            make_claim("B9", "inconclusive", fact="ratio", kind="opinion"),
            make_claim("B10", "setting not met", fact="RL"),
            make_claim("F2", "confirmed", fact="RL", kind="prediction"),
            make_claim("C4", "setting not met", kind="derivation"),
            make_claim("B11", "confirmed", fact="ratio", kind="count"),
        ]
    )
    assert list(claim_text.in_order(claims)["claim_id"]) == ["B1", "B5", "B9", "B3", "B10", "F2", "C4", "B11"]
    # The page lists each claim with its own verdict.
    assert claim_text.tally(claims)["confirmed"] == {"empirical claim": [("B1",), ("F2",)], "count": [("B11",)]}
    assert claim_text.headline(claims) == (
        "6 empirical claims about 3 facts: 1 confirmed, 1 contradicted, 1 not tested; "
        "1 derivation: 1 setting not met; 1 count: 1 confirmed"
    )
