import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.store.schemas import CLAIMS as COLUMNS
from lorabench.store.tables import Tables

from ..handmade.sft import LRS, arm, tables
from . import judged

IDS = ["A7", "B1", "B2", "B3", "B4"]

# A world in which every claim holds, arm by arm; a test changes one of them.
WORLD = {
    None: {"optimum": 3.2e-4},
    1: {"optimum": 1.2e-3, "floor": 2.1},
    4: {"optimum": 3.3e-3},
    16: {"optimum": 3.3e-3},
    64: {"optimum": 3.3e-3},
}


def world(changes=None, every=None):
    """Make the tables of `WORLD`, with the settings of some arms changed by rank, or of every arm."""
    changes = changes or {}
    return tables(arm(rank, **(settings | (every or {}) | changes.get(rank, {}))) for rank, settings in WORLD.items())


def test_every_claim_is_confirmed_where_all_hold():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    confirmed = judged(IDS, *world())
    assert confirmed["verdict"].to_dict() == dict.fromkeys(IDS, "confirmed")
    assert list(judge_claims(Tables(*world())).columns) == COLUMNS.names
    assert confirmed.loc["B1", "estimate"] == pytest.approx(3.3e-3 / 3.2e-4)
    assert confirmed.loc["B3", "estimate"] == pytest.approx(1.0)
    assert confirmed.loc["B4", "estimate"] == pytest.approx(3.3e-3 / 1.2e-3)
    assert confirmed["estimate"].between(confirmed["ci_low"] - 1e-9, confirmed["ci_high"] + 1e-9).all()
    assert confirmed.loc["A7", "n_runs"] == 2 * (len(LRS) + 2)


def test_what_tables_may_lack():
    runs, curves = world()
    for few, why in ((runs[:0], "no runs of the exp"), (runs.drop(columns="seed"), "no column seed")):
        claims = judged([claim.id for claim in CLAIMS], few)
        assert set(claims["verdict"]) == {"not tested"}
        assert claims.loc[IDS, "reason"].str.contains(why).all()
        assert list(claims.index) == [claim.id for claim in CLAIMS]
    # Columns that no criterion needs may be missing.
    few = runs.drop(columns=["train_tokens", "steps"])
    assert set(judged(IDS, few, curves.drop(columns=["examples", "tokens"]))["verdict"]) == {"confirmed"}


def test_only_runs_of_the_claims_experiment_are_read():
    runs, curves = world()
    runs["experiments"] = [np.array(["rank", "early"], dtype=object)] * len(runs)
    other, other_curves = world({64: {"floor": 3.0}})
    other = other.assign(run_id=other["run_id"] + "x", experiments="early other")
    assert set(judged(IDS, pd.concat([runs, other]), curves)["verdict"]) == {"confirmed"}
    assert set(judged(IDS, other, other_curves)["verdict"]) == {"not tested"}


# Final losses at the fitted minima ------------------------------------------------------------------------------------

MARGIN = 0.02 * 2.9  # the base has 5.0 nats, FullFT 2.1


def on_two_datasets(gaps, claim):
    """Judge a world of two datasets on which rank 64 is above FullFT by the given gaps, between LRs of the grid."""
    runs, curves = tables(
        arm(rank, optimum=3.3e-3 if rank else 3.2e-4, floor=2.0 + (gap if rank else 0.0), dataset=dataset, steps=steps)
        for (dataset, gap), steps in zip(gaps.items(), (64, 128), strict=True)
        for rank in (None, 64)
    )
    own = runs["seed"].map({0: 0.0, 1: 1.0, 2: -1.0}).astype(float) * runs["rank"].notna()
    runs["final_test_nll"] += 0.001 * own
    return judged(claim, runs, curves)


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
    small_only, both = on_two_datasets(gaps, "A7"), on_two_datasets(gaps, "B2")
    assert (small_only["verdict"], both["verdict"]) == (a7, b2)
    assert small_only["reason"].startswith("tiny/small (fewest tokens of 2 datasets)")
    assert both["reason"].startswith("tiny/large") or not large
    assert small_only["estimate"] == pytest.approx(small, abs=1e-3)
    assert abs(both["estimate"]) == pytest.approx(max(abs(small), abs(large)), abs=1e-3)
    assert small_only["fact"] == both["fact"]
    assert small_only["margin_high"] == pytest.approx(MARGIN, rel=0.01)
