"""Claims A1 to A6, A8 and N1 on training curves whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.store.tables import Tables

from ..handmade.sft import LRS, tables
from ..handmade.training import FALL, STEPS, shared, trained

CURVES = ["A1", "A2", "A3", "A4", "A5"]
# The first steps of three of the windows in which a departure is sought.
LEAVES = {1: 10, 4: 47, 16: 218}
RANKS = (*LEAVES, 64)
GAP, SLOPE = 0.1, 0.2  # a jump in nats above the margin of 0.058, and the growth from there on per tenfold steps
NOISY = (0.0, 0.1, -0.1)


def departing(left: float | None, slope: float = SLOPE):
    """Return a loss by step: the shared curve, left at a step with a gap that then grows."""

    def shape(step: float) -> float:
        gone = left is not None and step >= left
        return shared(step) + (GAP + slope * math.log10(step / left) if gone else 0.0)

    return shape


def learner(rank, leaves=LEAVES, **settings):
    """Make an arm for which the claims hold; its optimum is an LR of the grid."""
    columns = {"trainable_params": 100 * LEAVES.get(rank, 10_000), "first_epoch_nats": 69.0}
    return trained(
        rank,
        **(
            {"optimum": 3e-4 if rank is None else 3e-3, "floor": 2.1 if rank == 1 else 2.0}
            | {"shape": departing(leaves.get(rank)), "first_epoch_scored_tokens": 100}
            | columns
            | settings
        ),
    )


def world(changes=None, every=None, datasets=("short", "long"), leaves=LEAVES):
    """Make tables of datasets of which the last has the most examples; changes are by rank, or by dataset and rank."""
    changes = changes or {}
    return tables(
        learner(
            rank,
            leaves,
            dataset=dataset,
            batch_size=16 * (1 + place),
            **((every or {}) | changes.get(rank, {}) | changes.get((dataset, rank), {})),
        )
        for place, dataset in enumerate(datasets)
        for rank in (None, *RANKS)
    )


def judged(runs, curves, ids):
    claims = [claim for claim in CLAIMS if claim.id in ids]
    return judge_claims(Tables(runs, curves), claims).set_index("claim_id")


def one(tables_, claim):
    return judged(*tables_, [claim]).loc[claim]


def long_world(changes=None, every=None, leaves=LEAVES):
    return world(changes, every, ("long",), leaves)


def test_confirmed_where_they_hold():
    claims = judged(*world(), [*CURVES, "A7", "A8", "N1"])
    assert set(claims["verdict"]) == {"confirmed"}
    assert claims.loc["A1", "estimate"] == pytest.approx(0, abs=1e-9)
    assert claims.loc["A2", "estimate"] == pytest.approx(0, abs=0.02)
    # Between the departures of ranks 1 and 16 rank 1 has the gap.
    steps = np.array([step for step in np.unique(np.round(np.geomspace(1, STEPS, 140))) if 10 <= step < 218])
    assert claims.loc["A3", "estimate"] == pytest.approx(np.mean(GAP + SLOPE * np.log10(steps / 10)))
    assert claims.loc["A4", "estimate"] == pytest.approx((FALL - SLOPE) / FALL, abs=0.05)
    assert claims.loc["A5", "estimate"] == pytest.approx(1, abs=0.02)
    assert claims.loc["A8", "estimate"] == pytest.approx(0.1)
    assert claims.loc["N1", "estimate"] == pytest.approx(0.69)
    assert all(f"r{rank} leaves at step {step}" in claims.loc["A3", "reason"] for rank, step in LEAVES.items())
    assert claims.loc["A3", "reason"].startswith("tiny/long (most examples of 2 datasets)")
    assert not claims["reason"].str.contains("nan").any()


def bent(step):
    return 2.0 + 40 / step


def rising(step):
    return 2.0 + 0.1 * math.log10(step)


@pytest.mark.parametrize(
    ("claim", "changes", "leaves"),
    [
        ("A1", {64: {"shape": departing(100)}}, LEAVES),
        ("A2", {None: {"shape": bent}}, LEAVES),
        ("A2", {64: {"shape": rising}}, LEAVES),
        ("A3", {}, {1: 218, 4: 47, 16: 10}),
    ],
)
def test_contradicted_where_they_fail(claim, changes, leaves):
    assert one(long_world(changes, leaves=leaves), claim)["verdict"] == "contradicted"


def test_a_floor_contradicts_a4():
    floor = {1: {"shape": departing(10, slope=FALL)}}
    claim = one(long_world(floor), "A4")
    assert (claim["verdict"], claim["estimate"]) == ("contradicted", pytest.approx(0, abs=0.05))
    assert "LoRA r1 from step 21 on" in claim["reason"]


@pytest.mark.parametrize(
    ("claim", "changes", "every", "why"),
    [
        ("A1", {}, {"own": NOISY}, "windows"),
        # A slow start whose gap shrinks is no departure.
        ("A3", {rank: {"shape": lambda step: shared(step) + 0.4 / step**0.2} for rank in LEAVES}, {}, "lags without"),
        # All ranks at one step.
        ("A3", {rank: {"shape": departing(47)} for rank in LEAVES}, {}, "fewer than two steps"),
        ("A3", {}, {"own": NOISY}, "no rank surely leaves"),
        ("A5", {16: {"shape": shared}}, {}, "too few for a slope; left out: tiny/long r16 stays"),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claim, changes, every, why):
    row = one(long_world(changes, every), claim)
    assert row["verdict"] == "inconclusive"
    assert why in row["reason"]


@pytest.mark.parametrize(
    ("claims", "changes", "every", "why"),
    [
        (CURVES, {64: {"lrs": LRS[:4]}}, {}, "edge of its grid"),
        # The seeds are at an LR of the grid that loses 0.03 nats.
        (["A1", "A3", "A5"], {64: {"optimum": 5.2e-3}}, {}, "not the fitted optima"),
    ],
)
def test_what_leaves_all_open(claims, changes, every, why):
    rows = judged(*long_world(changes, every), claims)
    assert set(rows["verdict"]) == {"inconclusive"}
    assert rows["reason"].str.contains(why).all()


def test_a4_is_not_tested_where_no_rank_leaves():
    stays = {("short", rank): {"shape": shared} for rank in LEAVES}
    assert one(world(stays), "A4")["verdict"] == "confirmed"
    assert one(long_world(every={"shape": shared}), "A4")["verdict"] == "not tested"


def test_a_rank_that_never_joined_gives_no_threshold():
    row = one(long_world({1: {"shape": departing(1.5)}}), "A5")
    assert "tiny/long r1 never joined" in row["reason"]


def late(left: float):
    """Return a loss by step that leaves the shared curve between two windows' first steps, without a jump."""
    return lambda step: shared(step) + 0.4 * max(math.log10(step / left), 0.0)


def test_departures_within_windows_do_not_bend_the_threshold():
    changes = {rank: {"shape": late(left), "trainable_params": left} for rank, left in {1: 14, 4: 40, 16: 130}.items()}
    # The windows in which they depart begin at other ratios of steps.
    assert one(long_world(changes), "A5")["estimate"] == pytest.approx(1, abs=0.01)


def test_a5_is_contradicted_where_the_threshold_does_not_grow():
    same = {rank: {"shape": departing(47), "trainable_params": 100 * rank**2} for rank in LEAVES}
    row = one(world(same), "A5")
    assert (row["verdict"], row["estimate"]) == ("contradicted", pytest.approx(0, abs=1e-9))


def test_a8_needs_a_gap_that_grows():
    slow = one(long_world({1: {"shape": lambda step: shared(step) + 0.4 / step**0.2}}), "A8")
    assert slow["verdict"] == "inconclusive"
    assert "slow learning" in slow["reason"]
    assert one(long_world({1: {"floor": 2.0}}), "A8")["verdict"] == "contradicted"


# The highest rank is worse on one dataset and better on the other, by twice the margin of 0.058 nats.
OPPOSITE = {("short", 64): {"floor": 2.116}, ("long", 64): {"floor": 1.884}}


@pytest.mark.parametrize(
    ("changes", "every", "verdict"),
    [
        (OPPOSITE, {}, "confirmed"),
        ({("short", 64): {"floor": 2.116}}, {}, "contradicted"),
        (OPPOSITE, {"data_kind": "worked"}, "setting not met"),
    ],
)
def test_better_on_one_dataset_and_worse_on_another(changes, every, verdict):
    row = one(world(changes, every), "A6")
    assert row["verdict"] == verdict
    assert row["estimate"] == pytest.approx(2 if changes == OPPOSITE else 0, abs=0.01)


@pytest.mark.parametrize(
    ("nats", "verdict"),
    [((69.0, 70.0, 68.0), "confirmed"), ((20.0, 21.0, 19.0), "contradicted"), ((110.0, 120.0, 130.0), "inconclusive")],
)
def test_the_first_epochs_bits(nats, verdict):
    runs, curves = long_world()
    row = one((runs.assign(first_epoch_nats=runs["seed"].map(lambda seed: nats[seed])), curves), "N1")
    assert (row["verdict"], row["estimate"]) == (verdict, pytest.approx(np.mean(nats) / 100))
    generated = runs.assign(data_kind="worked")
    assert one((generated, curves), "N1")["verdict"] == "setting not met"


def test_missing_arms_and_curves():
    runs, curves = long_world()
    no_fullft = judged(runs[runs["method"] == "lora"], curves, ["A1", "A2", "A4", "A8"])
    assert set(no_fullft["verdict"]) == {"inconclusive"}
    validation = curves[curves["split"] == "validation"]
    for without in (pd.DataFrame(), validation, curves.assign(value=math.nan)):
        claims = judged(runs, without, CURVES)["verdict"].to_dict()
        assert claims == {"A1": "not tested", "A2": "not tested", "A3": "not tested", "A4": "not tested"} | {
            "A5": "inconclusive" if len(without) else "not tested"
        }
    assert "no column tokens" in one((runs, curves.drop(columns="tokens")), "A5")["reason"]


def test_facts_are_left_out():
    runs, curves = long_world()
    facts, more = long_world({64: {"shape": departing(100)}})
    facts = facts.assign(run_id="f" + facts["run_id"], dataset="facts", entropy_bits=9.0)
    both = pd.concat([runs, facts]), pd.concat([curves, more.assign(run_id="f" + more["run_id"])])
    assert set(judged(*both, [*CURVES, "A8", "N1"])["verdict"]) <= {"confirmed", "inconclusive"}
    assert one(both, "A1")["verdict"] == "confirmed"
