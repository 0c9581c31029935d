"""Batches of runs are judged together, each look at its level, and the first decision stays."""

import numpy as np
import pytest
from scipy.special import ndtri

from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.estimate import ExampleLosses, student
from lorabench.analysis.finding import decide
from lorabench.analysis.rules import Within
from lorabench.analysis.sequential import LOOK, Look, level
from lorabench.claims.batches import Batch, judge_batches
from lorabench.claims.judge import CLAIMS
from lorabench.errors import UserError
from lorabench.store.tables import Tables

from ..handmade import sft

B2 = [claim for claim in CLAIMS if claim.id == "B2"]
REGISTERED = [Batch(number, "registered", "by A. Tester") for number in range(1, 6)]


def test_a_look_widens_an_error_to_that_between_the_batches():
    arms = {"a1": "a", "a2": "a", "b1": "b"}
    alone = [Look(arms, claim="X1"), Look(arms, claim="X1")]
    for look, value, seeds in zip(alone, (1.0, 3.0), (3, 1), strict=True):
        assert look.guarded(student(value, 0.1, 1e6, "x", seeds), ["a1"]).looks == 0
    together = Look(arms, [look.seen for look in alone], claim="X1")
    guarded = together.guarded(student(1.5, 0.1, 1e6, "x", 4), ["a2"])
    # The weights are 3/4 and 1/4 around the mean of 1.5: 2 (9/16 1/4 + 1/16 9/4) = 9/16.
    assert guarded.interval() == pytest.approx((1.5 - 1.96 * 0.75, 1.5 + 1.96 * 0.75), abs=0.01)
    # A second number about the same arms, other arms and another claim have no estimates of batches alone.
    for run_ids in (["a2"], ["b1"]):
        free = together.guarded(student(1.5, 0.1, 1e6, "x", 4), run_ids)
        assert (free.looks, round(free.interval()[1], 1)) == (2, 1.7)


@pytest.mark.parametrize("looks", [0, 1, 4])
def test_each_look_is_judged_at_its_level_and_its_intervals_hold_together(looks):
    def judged(value: float):
        outer = LOOK.set(Look({}, [{}] * looks) if looks else None)
        try:
            return decide(Within.margin(1.0), student(value, 0.1, 1e6, "x", 3), "", ())
        finally:
            LOOK.reset(outer)

    one_sided, two_sided = -0.1 * ndtri(level(0.05, looks)), -0.1 * ndtri(level(0.025, looks))
    values = [1 - one_sided - 0.002, 1 - one_sided + 0.002, 1 + two_sided - 0.002, 1 + two_sided + 0.002]
    expected = ["confirmed", "inconclusive", "inconclusive", "contradicted"]
    assert [judged(value).verdict for value in values] == expected
    assert judged(0.0).ci_high == pytest.approx(two_sided, rel=0.01)
    assert judged(1 + two_sided).against == pytest.approx(0.05, rel=0.05)


SPREAD = 0.2


@pytest.mark.parametrize("shared", [False, True])
def test_the_error_of_test_examples_that_batches_share_is_not_averaged(shared):
    tables = sft.batches(dict.fromkeys(range(1, 5), 0.0), spread=SPREAD, shared=shared)
    judging = Judging(examples=ExampleLosses.of(tables.test_losses))
    [comparison] = comparisons(tables.runs, tables.curves, judging)
    fullft, lora = comparison.arms
    gap, of_one = comparison.gap(lora, fullft), SPREAD * np.sqrt(2 / 100)
    assert (gap.n_seeds, gap.n_examples, gap.renewed) == (20, 100 if shared else 400, not shared)
    # Seeds see a part of what differs between the batches.
    error = np.hypot(gap.seed_error, gap.example_error)
    assert error == pytest.approx(of_one if shared else of_one / 2, rel=0.15)


def looks_at(tables: Tables, batches=REGISTERED):
    claims, by_batch = judge_batches(tables, batches, B2)
    [claim] = claims.to_dict("records")
    return claim, by_batch


def test_the_first_decision_stays_and_a_later_disagreement_is_shown():
    # The margin is 0.058.
    claim, by_batch = looks_at(sft.batches({1: 0.0, 2: 0.12, 3: 0.12}), REGISTERED[:3])
    assert by_batch["verdict"].tolist() == ["confirmed", *["inconclusive"] * 2]
    assert by_batch["spent"].tolist() == pytest.approx([0.05 / 3, 0.025, 0.03])
    assert (claim["verdict"], claim["n_seeds"]) == ("confirmed", 5)
    assert claim["reason"].startswith("decided after 1 batch, level spent 1.7% of 5%; with later batches incon")
    # The estimates of the batches differ by far more than their errors, so that all together decide nothing.
    assert by_batch["estimate"].tolist() == pytest.approx([0.0, 0.06, 0.08], abs=0.01)
    assert (by_batch["ci_high"] - by_batch["ci_low"]).iloc[1] > 0.2


def test_a_decision_that_later_batches_share_has_the_numbers_of_all():
    claim, by_batch = looks_at(sft.batches({1: 0.0, 2: 0.01, 3: 0.02}), REGISTERED[:3])
    assert by_batch["verdict"].tolist() == ["confirmed"] * 3
    assert claim["reason"].startswith("decided after 1 batch, level spent 1.7% of 5%: ")
    assert claim["n_seeds"] == 15
    numbers = ["estimate", "ci_low", "ci_high"]
    assert [claim[name] for name in numbers] == by_batch[numbers].iloc[-1].tolist()


def test_batches_that_are_not_registered_are_named_and_not_counted():
    tables = sft.batches({0: 0.5, 1: 0.055, 2: 0.057, 3: 0.5})
    others = [Batch(0, "explored", "explored"), *REGISTERED[:2], Batch(3, "unregistered", "unregistered")]
    claim, by_batch = looks_at(tables, others)
    assert by_batch["batches"].tolist() == [1, 2]
    assert claim["estimate"] == pytest.approx(0.056, abs=0.003)
    assert "open after 2 batches, 2.5% of 5% spent; at this error more than 30 further batches; " in claim["reason"]
    assert "without batch 0 (explored), batch 3 (unregistered)" in claim["reason"]
    with pytest.raises(UserError, match=r"no batch of runs is registered.*batch 0: explored; batch 3: unregistered"):
        looks_at(tables, [others[0], others[-1]])
