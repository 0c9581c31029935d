from __future__ import annotations

import math

import pandas as pd
import pytest

from lorabench.claims.catalog import CLAIMS
from lorabench.claims.judge import judge_claims
from lorabench.tables.tables import Tables

from ..handmade.sft import LRS, arm, tables

IDS = ["A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "N1"]
STEPS = [0, *(2**power for power in range(11))]
PARAMS = 1000  # of an adapter, per rank
FALL = 0.3  # nats per tenfold steps
RANKS = (1, 4, 16, 64)
NOISY = (0.0, 0.03, -0.03)


def shared(step: int) -> float:
    return 4.0 - FALL * math.log10(step)


def departing(rank: int | None, slope: float = 0.2, first: int = 4, power: float = 1.0):
    """Return a loss by step: the shared curve, which all ranks but the highest leave at a step proportional to rank."""

    def shape(step: int) -> float:
        if rank in (None, RANKS[-1]):
            return shared(step)
        left = first * rank**power
        return shared(step) + (slope * math.log10(step / left) + 0.05 if step >= left else 0.0)

    return shape


def curved(of_arm, shape):
    """Make an arm with the curve `shape(step)`, which is higher away from the optimal LR, as the final loss is."""
    runs, _ = of_arm
    lowest = min(row["final_valid_nll"] for row in runs if row["final_valid_nll"] is not None and row["seed"] == 0)
    curves = [
        {
            "run_id": row["run_id"],
            "step": step,
            "examples": step * row["batch_size"],
            "tokens": 100 * step * row["batch_size"],
            "split": "validation",
            "metric": "nll",
            "value": 5.0 if step == 0 else shape(step) + row["final_valid_nll"] - lowest,
        }
        for row in runs
        for step in STEPS
    ]
    return runs, curves


def learner(rank, shape=None, floor=None, **settings):
    """Make an arm for which the claims hold: rank 1 is worse in the end, and the other ranks are like FullFT."""
    floor = floor if floor is not None else 2.1 if rank == 1 else 2.0
    columns = {"trainable_params": PARAMS * (rank or 100), "first_epoch_nats": 69.0, "first_epoch_scored_tokens": 100}
    optimum = 1e-3 if rank is None else 3e-3
    settings = {"optimum": optimum, "steps": STEPS[-1]} | columns | settings
    return curved(arm(rank, floor=floor, **settings), shape or departing(rank))


def epochs(offsets=(69.0, 70.0, 68.0)):
    """Return a function that sets the first-epoch losses of a runs table by seed."""

    def change(runs: pd.DataFrame) -> pd.DataFrame:
        return runs.assign(first_epoch_nats=runs["seed"].map(lambda seed: offsets[seed]).astype(float))

    return change


def world(changes=None, every=None, datasets=("short", "long")):
    """Make tables of two datasets that differ in whether the highest rank is better or worse than FullFT."""
    changes, every = changes or {}, every or {}
    arms = [
        learner(rank, **({"dataset": dataset} | every | changes.get(rank, {}) | changes.get((dataset, rank), {})))
        for dataset in datasets
        for rank in (None, *RANKS)
    ]
    runs, curves = tables(arms)
    return epochs()(runs), curves


# High rank worse on one dataset, better on the other, by 5 sigma of 0.004.
OPPOSITE = {("short", 64): {"floor": 2.02}, ("long", 64): {"floor": 1.98}}


def judged(runs, curves, ids):
    claims = [claim for claim in CLAIMS if claim.id in ids]
    return judge_claims(Tables(runs, curves), claims).set_index("claim_id")


def verdict(tables, claim):
    return judged(*tables, [claim]).loc[claim, "verdict"]


@pytest.fixture(scope="module")
def confirmed():
    return judged(*world(OPPOSITE), IDS)


def test_confirmed_where_they_hold(confirmed):
    # Where A6 holds A7 can't.
    assert confirmed.drop(index="A7")["verdict"].to_dict() == dict.fromkeys([i for i in IDS if i != "A7"], "confirmed")
    assert verdict(world(), "A7") == "confirmed"


def test_the_numbers_are_those_of_the_tables(confirmed):
    assert confirmed.loc["A2", "estimate"] == pytest.approx(0, abs=0.01)
    # 0.2 less steep than FullFT.
    assert confirmed.loc["A4", "estimate"] == pytest.approx(0.2 - FALL, abs=1e-6)
    # Rank and step of departure are proportional, and so are parameters and tokens.
    assert confirmed.loc["A5", "estimate"] == pytest.approx(1)
    assert confirmed.loc["A6", "estimate"] == pytest.approx(5)
    assert confirmed.loc["N1", "estimate"] == pytest.approx(0.69)
    for claim in ("A2", "A4", "A5", "A6", "N1"):
        low, estimate, high = confirmed.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low <= estimate <= high
        assert low < high or claim == "A6"
    assert (confirmed["n_runs"] == confirmed["run_ids"].map(len)).all()
    per_arm = len(LRS) + 2
    # A5: ranks 1, 4, 16 leave, on two datasets. A2, A6: FullFT and the highest rank.
    assert confirmed["n_runs"].loc[["A2", "A5", "A6", "N1"]].tolist() == [4 * per_arm, 6 * per_arm, 4 * per_arm, 6]


def test_reasons_name_data_and_arms(confirmed):
    assert not confirmed["reason"].str.contains("nan").any()
    for claim in ("A2", "A4", "A5", "A6", "N1"):
        assert "tiny/short" in confirmed.loc[claim, "reason"]
        assert "tiny/long" in confirmed.loc[claim, "reason"]
    assert "LoRA r16 after step 64" in confirmed.loc["A4", "reason"]
    assert "tiny/long r64 stays" in confirmed.loc["A5", "reason"]
    assert "-5.0 sigma" in confirmed.loc["A6", "reason"]


def bent(step: int) -> float:
    return 2.0 + 4 / step


def rising(step: int) -> float:
    return 2.0 + 0.1 * math.log10(step)


def floored(rank):
    return departing(rank, slope=FALL)


@pytest.mark.parametrize(
    ("claim", "changes"),
    [
        ("A2", {None: {"shape": bent}}),
        ("A2", {64: {"shape": rising}}),
        ("A4", {1: {"shape": floored(1)}}),
        ("A4", {4: {"shape": departing(4, slope=-0.02)}}),
        ("A5", {rank: {"shape": departing(rank, first=16, power=0.0)} for rank in RANKS[:3]}),
        ("A6", {64: {"floor": 2.05}}),
        ("A6", {}),
        ("N1", {None: {"first_epoch_nats": 20.0}}),
    ],
)
def test_contradicted_where_they_fail(claim, changes):
    runs, curves = world(changes)
    if claim == "N1":
        runs = epochs((20.0, 21.0, 19.0))(runs)
    assert verdict((runs, curves), claim) == "contradicted"


@pytest.mark.parametrize(
    ("claim", "changes", "every"),
    [
        # A scatter as wide as the fall hides whether the curve bends.
        ("A2", {}, {"offsets": (0.0, 0.3, -0.3)}),
        ("A4", {}, {"offsets": (0.0, 0.08, -0.08)}),
        ("A4", {None: {"shape": floored(1)}}, {}),
        # Between proportional and not.
        ("A5", {rank: {"shape": departing(rank, first=8, power=0.5)} for rank in RANKS[:3]}, {}),
        ("A6", OPPOSITE, {"offsets": (0.0,)}),
        ("A6", {("short", 64): {"floor": 2.02, "offsets": (0.0, 0.012, -0.016)}, ("long", 64): {"floor": 1.98}}, {}),
        ("A6", OPPOSITE | {("long", 64): {"floor": 1.98, "lrs": LRS[:4]}}, {}),
        *((claim, {None: {"lrs": LRS[2:]}}, {}) for claim in ("A2", "A4", "A5", "A6")),
        *((claim, {}, {"offsets": (0.0,)}) for claim in ("A2", "A4", "A5", "N1")),
    ],
)
def test_inconclusive_where_noise_or_data_leave_it_open(claim, changes, every):
    assert verdict(world(changes, every), claim) == "inconclusive"


def test_first_epochs_that_straddle_the_band_are_inconclusive():
    runs, curves = world()
    assert verdict((epochs((110.0, 120.0, 130.0))(runs), curves), "N1") == "inconclusive"


def test_n1_is_not_tested_on_runs_shorter_than_an_epoch_or_without_the_columns():
    runs, curves = world()
    assert verdict((runs.assign(first_epoch_nats=math.nan), curves), "N1") == "not tested"
    claim = judged(runs.drop(columns="first_epoch_nats"), curves, ["N1"]).loc["N1"]
    assert (claim["verdict"], "first_epoch_nats" in claim["reason"]) == ("not tested", True)


def test_a4_is_not_tested_where_no_rank_leaves():
    every = {"shape": shared}
    claims = judged(*world(every=every), ["A4", "A5"])
    assert claims.loc["A4", "verdict"] == "not tested"
    assert claims.loc["A5", "verdict"] == "inconclusive"
    assert "r1 stays" in claims.loc["A5", "reason"]
    # A dataset on which no rank leaves does not prevent a verdict on another.
    stays = {("short", rank): every for rank in RANKS}
    assert verdict(world(stays), "A4") == "confirmed"


def test_a_rank_that_never_joined_has_no_threshold():
    late = {rank: {"shape": lambda step: shared(step) + 0.1} for rank in RANKS[:3]}
    claims = judged(*world(late), ["A4", "A5"])
    assert claims["verdict"].tolist() == ["not tested", "inconclusive"]
    assert "tiny/long r4 never joined" in claims.loc["A5", "reason"]


def test_thresholds_of_an_arm_at_its_grids_edge_do_not_count():
    claims = judged(*world({16: {"lrs": LRS[:4]}}), ["A4", "A5"])
    assert "r16 at its grid's edge" in claims.loc["A5", "reason"]
    assert claims.loc["A5", "n_runs"] == 4 * (len(LRS) + 2)
    assert claims.loc["A4", "verdict"] == "inconclusive"


def test_the_threshold_may_lie_elsewhere_on_other_data():
    # Four times the tokens on one dataset: the same slope, another intercept.
    later = {("long", rank): {"shape": departing(rank, first=16)} for rank in RANKS}
    claim = judged(*world(later), ["A5"]).loc["A5"]
    assert (claim["verdict"], claim["estimate"]) == ("confirmed", pytest.approx(1))


def test_missing_arms():
    runs, curves = world(OPPOSITE)
    no_fullft = judged(runs[runs["method"] == "lora"], curves, IDS)
    assert no_fullft.loc[["A2", "A4", "A5", "A6"], "verdict"].tolist() == ["inconclusive"] * 4
    only_fullft = judged(runs[runs["method"] == "fullft"], curves, IDS)
    assert set(only_fullft.drop(index="N1")["verdict"]) == {"inconclusive"}
    one_dataset = judged(runs[runs["dataset"] == "long"], curves, IDS)
    assert one_dataset.loc["A6", "verdict"] == "not tested"


def test_no_curves():
    runs, curves = world()
    for nothing in (pd.DataFrame(), curves.assign(value=math.nan)):
        claims = judged(runs, nothing, ["A2", "A4", "A5"])
        assert claims["verdict"].tolist() == ["not tested", "not tested", "inconclusive"]


def test_the_longest_runs_of_a_dataset_decide():
    short, long = world({}, datasets=("long",)), world(datasets=("long",))
    other = short[0]["run_id"] + "-short"
    runs = pd.concat([short[0].assign(run_id=other, steps=64), long[0]])
    curves = pd.concat([short[1][short[1]["step"] <= 64].assign(run_id=lambda t: t["run_id"] + "-short"), long[1]])
    for claim in ("A3", "A4", "A5", "A8", "N1"):
        judged_claim = judged(runs, curves, [claim]).loc[claim]
        # Three thresholds alone are too few for a verdict on their slope.
        assert judged_claim["verdict"] == ("inconclusive" if claim == "A5" else "confirmed")
        assert len(judged_claim["run_ids"])
        assert not any(run_id.endswith("-short") for run_id in judged_claim["run_ids"])


def facts(bits_by_rank, growth=0.02, params=PARAMS, entropy=40_000.0, tokens=10_000, **settings):
    """Make arms that store the given bits of random facts, a share `growth` of them in the second half of the steps."""

    def loss(bits: float) -> float:
        return (entropy - bits) * math.log(2) / tokens

    def shape(bits):
        return lambda step: loss(bits) + (0 if step == STEPS[-1] else growth * bits * math.log(2) / tokens)

    arms = [
        curved(
            arm(
                rank,
                optimum=1e-3,
                floor=loss(bits),
                dataset="facts",
                steps=STEPS[-1],
                entropy_bits=entropy,
                test_scored_tokens=tokens,
                trainable_params=params * (rank or 100),
                **settings,
            ),
            shape(bits),
        )
        for rank, bits in bits_by_rank.items()
    ]
    return tables(arms)


SATURATED = {None: 39_000.0, 1: 2_000.0, 4: 8_200.0, 16: 30_000.0}


def test_two_bits_per_parameter_confirmed():
    claim = judged(*facts(SATURATED), ["N2"]).loc["N2"]
    assert claim["verdict"] == "confirmed"
    # Of ranks 1 and 4, which the next rank outdoes, rank 4 is further from 2.
    assert claim["estimate"] == pytest.approx(2.05)
    assert claim["ci_low"] < 2.05 < claim["ci_high"]
    assert "r16 1.88" in claim["reason"]
    assert claim["n_runs"] == 3 * 3


@pytest.mark.parametrize(
    ("bits", "settings", "expected"),
    [
        (SATURATED | {4: 3_000.0}, {}, "contradicted"),
        (SATURATED | {1: 4_000.0}, {}, "contradicted"),
        # A value above the band stays above it, however long training goes on.
        (SATURATED | {1: 4_000.0}, {"growth": 0.3}, "contradicted"),
        (SATURATED | {4: 3_000.0}, {"growth": 0.3}, "inconclusive"),
        (SATURATED, {"growth": 0.3}, "inconclusive"),
        # A single rank, a next rank that stores no more, and a rank that stores all facts.
        ({1: 2_000.0}, {}, "inconclusive"),
        ({1: 2_000.0, 4: 2_000.0}, {}, "inconclusive"),
        ({1: 2_000.0, 4: 8_000.0}, {"entropy": 2_100.0}, "inconclusive"),
        (SATURATED, {"offsets": (0.0,)}, "inconclusive"),
        (SATURATED, {"offsets": (0.0, 0.004)}, "inconclusive"),
        (SATURATED, {"offsets": NOISY}, "inconclusive"),
        (SATURATED, {"lrs": LRS[2:]}, "inconclusive"),
        ({None: 39_000.0}, {}, "inconclusive"),
    ],
)
def test_two_bits_per_parameter_otherwise(bits, settings, expected):
    claim = judged(*facts(bits, **settings), ["N2"]).loc["N2"]
    assert claim["verdict"] == expected
    assert "nan" not in claim["reason"]


def test_without_curves_it_is_not_known_whether_storing_has_ended():
    runs, _ = facts(SATURATED)
    claim = judged(runs, pd.DataFrame(), ["N2"]).loc["N2"]
    assert claim["verdict"] == "inconclusive"
    assert "still storing" in claim["reason"]


def test_facts_are_for_n2_and_all_else_for_the_others():
    runs, curves = world(OPPOSITE)
    more, more_curves = facts(SATURATED)
    both = pd.concat([runs, more]), pd.concat([curves, more_curves])
    together = judged(*both, [*IDS, "N2"])
    pd.testing.assert_frame_equal(together.loc[IDS], judged(runs, curves, IDS))
    # A column without any value has the same effect.
    alone = judged(more, more_curves, ["N2"]).drop(columns="published")
    pd.testing.assert_frame_equal(together.loc[["N2"]].drop(columns="published"), alone)
    assert judged(runs.assign(entropy_bits=math.nan, test_scored_tokens=1), curves, ["N2"])["verdict"].item() == (
        "not tested"
    )
    assert set(judged(more, more_curves, IDS)["verdict"]) == {"not tested"}


def test_claims_on_thresholds_read_both_experiments():
    runs, curves = world()
    read = {
        claim.id
        for claim in CLAIMS
        if claim.id[0] in "AN"
        and judged(runs.assign(experiments="capacity"), curves, [claim.id])["verdict"].item() == "confirmed"
    }
    assert read == {"A3", "A4", "A5", "A8", "N1"}
