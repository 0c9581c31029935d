"""Claims A7 and B2: the final losses of the highest rank and FullFT at the fitted minima."""

from __future__ import annotations

import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.store.tables import Tables

from ..handmade.sft import arm, tables

MARGIN = 0.02 * 2.9  # the base has 5.0 nats, FullFT 2.1


def judged(gaps, claim, sigma=0.001, loss_margin=0.02):
    """Judge a world of two datasets on which rank 64 is above FullFT by the given gaps, between LRs of the grid."""
    runs, curves = tables(
        arm(rank, optimum=3.3e-3 if rank else 3.2e-4, floor=2.0 + (gap if rank else 0.0), dataset=dataset, steps=steps)
        for (dataset, gap), steps in zip(gaps.items(), (64, 128), strict=True)
        for rank in (None, 64)
    )
    own = runs["seed"].map({0: 0.0, 1: 1.0, 2: -1.0}).astype(float) * runs["rank"].notna()
    runs["final_test_nll"] += sigma * own
    [chosen] = [declared for declared in CLAIMS if declared.id == claim]
    margins = DEFAULT_MARGINS.model_copy(update={"loss": loss_margin})
    return judge_claims(Tables(runs, curves), [chosen], margins).iloc[0]


@pytest.mark.parametrize(
    ("small", "large", "a7", "b2"),
    [
        (0.0, 0.0, "confirmed", "confirmed"),
        (0.0, 1.5 * MARGIN, "confirmed", "contradicted"),
        (-1.5 * MARGIN, 0.0, "contradicted", "contradicted"),
        (MARGIN, 0.0, "inconclusive", "inconclusive"),
    ],
)
def test_equal_within_the_margin(small, large, a7, b2):
    gaps = {"small": small, "large": large}
    one, both = judged(gaps, "A7"), judged(gaps, "B2")
    assert (one["verdict"], both["verdict"]) == (a7, b2)
    assert one["reason"].startswith("tiny/small (fewest tokens of 2 datasets)")
    assert one["estimate"] == pytest.approx(small, abs=1e-3)
    assert abs(both["estimate"]) == pytest.approx(max(abs(small), abs(large)), abs=1e-3)
    assert one["fact"] == both["fact"]
    assert one["margin_high"] == pytest.approx(MARGIN, rel=0.01)


def test_noise_leaves_it_open_and_seeds_would_decide():
    row = judged({"small": 0.0, "large": 0.0}, "B2", sigma=0.05)
    assert (row["verdict"], row["decide_seeds"] > 3) == ("inconclusive", True)


@pytest.mark.parametrize(("inside", "borderline"), [(0.05, True), (0.2, False)])
def test_a_verdict_whose_end_lies_near_the_margin_is_borderline(inside, borderline):
    """The margin is put at the end of the 90% interval, and further by a share of the margin."""
    gaps, low, high = {"small": 0.02, "large": 0.0}, 0.0, 0.2
    for _ in range(20):
        middle = (low + high) / 2
        confirmed = judged(gaps, "A7", loss_margin=middle)["verdict"] == "confirmed"
        low, high = (low, middle) if confirmed else (middle, high)
    row = judged(gaps, "A7", loss_margin=high / (1 - inside))
    assert (row["verdict"], row["borderline"]) == ("confirmed", borderline)
