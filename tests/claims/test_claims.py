from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.claims.scope import full_runs
from lorabench.errors import UserError
from lorabench.store.schemas import CLAIMS as COLUMNS
from lorabench.store.tables import Tables

from ..handmade.sft import LRS, arm, tables

IDS = ["A7", "B1", "B2", "B3", "B4"]

# A world in which every claim holds, arm by arm; a test changes one of them.
WORLD = {
    None: {"optimum": 3.2e-4},
    1: {"optimum": 1.2e-3, "floor": 2.1, "leaves_at": 4},
    4: {"optimum": 3.3e-3, "leaves_at": 16},
    16: {"optimum": 3.3e-3},
    64: {"optimum": 3.3e-3},
}


def world(changes=None, every=None):
    """Make the tables of `WORLD`, with the settings of some arms changed by rank, or of every arm."""
    changes = changes or {}
    return tables(arm(rank, **(settings | (every or {}) | changes.get(rank, {}))) for rank, settings in WORLD.items())


def judged(runs, curves, ids=IDS):
    claims = [claim for claim in CLAIMS if claim.id in ids]
    return judge_claims(Tables(runs, curves), claims).set_index("claim_id")


@pytest.fixture(scope="module")
def confirmed():
    return judged(*world())


def test_every_claim_is_confirmed_where_all_hold(confirmed):
    assert confirmed["verdict"].to_dict() == dict.fromkeys(IDS, "confirmed")
    assert list(judge_claims(Tables(*world())).columns) == COLUMNS.names


def test_the_numbers_are_those_of_the_tables(confirmed):
    assert confirmed.loc["B1", "estimate"] == pytest.approx(3.3e-3 / 3.2e-4)
    assert confirmed.loc["B3", "estimate"] == pytest.approx(1.0)
    assert confirmed.loc["B4", "estimate"] == pytest.approx(3.3e-3 / 1.2e-3)
    for claim in ("A7", "B1", "B2", "B3", "B4"):
        low, estimate, high = confirmed.loc[claim, ["ci_low", "estimate", "ci_high"]]
        assert low - 1e-9 <= estimate <= high + 1e-9
    assert (confirmed["n_runs"] == confirmed["run_ids"].map(len)).all()
    assert confirmed.loc["A7", "n_runs"] == 2 * (len(LRS) + 2)


def test_one_seed_decides_nothing():
    claims = judged(*world(every={"offsets": (0.0,)}))
    assert claims["verdict"].to_dict() == dict.fromkeys(IDS, "inconclusive")
    assert claims["reason"].str.contains("seeds").all()
    assert not claims["reason"].str.contains("nan").any()
    failing = judged(*world({64: {"floor": 3.0, "optimum": 3e-4, "leaves_at": 1}}, {"offsets": (0.0,)}))
    assert set(failing["verdict"]) == {"inconclusive"}


def test_an_optimum_at_the_edge_decides_nothing():
    claims = judged(*world({64: {"lrs": LRS[:4]}}))
    assert claims["verdict"].tolist() == ["inconclusive"] * len(IDS)
    assert claims["reason"].str.contains("edge of its grid").all()


@pytest.mark.parametrize("runs", [pd.DataFrame(), world()[0].iloc[:0], world()[0].drop(columns="seed")])
def test_tables_without_runs_or_columns_are_not_tested(runs):
    claims = judged(runs, pd.DataFrame(), [claim.id for claim in CLAIMS])
    assert set(claims["verdict"]) == {"not tested"}
    assert claims.loc[IDS, "reason"].str.contains("empty|no runs of the experiment|no column seed").all()
    assert list(claims.index) == [claim.id for claim in CLAIMS]


def test_columns_that_no_criterion_needs_may_be_missing():
    runs, curves = world()
    claims = judged(
        runs.drop(columns=["train_tokens", "steps"]),
        curves.drop(columns=["examples", "tokens"], errors="ignore").assign(examples=0, tokens=0),
    )
    assert set(claims["verdict"]) == {"confirmed"}


def test_only_runs_of_the_claims_experiment_are_read():
    runs, curves = world()
    runs["experiments"] = [np.array(["rank", "early"], dtype=object)] * len(runs)
    other, other_curves = world({64: {"floor": 3.0}})
    other = other.assign(run_id=other["run_id"] + "x", experiments="short_run other")
    assert set(judged(pd.concat([runs, other]), curves)["verdict"]) == {"confirmed"}
    assert set(judged(other, other_curves)["verdict"]) == {"not tested"}


def two_datasets(changes, model="tiny"):
    """Make the tables of `WORLD` on a short and a long dataset, with changes by dataset and rank."""
    return [
        arm(rank, **(settings | changes.get(dataset, {}).get(rank, {})), dataset=dataset, steps=steps, model=model)
        for dataset, steps in (("short", 128), ("long", 512))
        for rank, settings in WORLD.items()
    ]


def test_a_claim_about_all_data_needs_all_of_it():
    claims = judged(*tables(two_datasets({"long": {64: {"floor": 2.1}}})), ["B2"])
    assert claims.loc["B2", "verdict"] == "contradicted"
    assert claims.loc["B2", "reason"].startswith("tiny/long")
    assert "tiny/short" in claims.loc["B2", "reason"]
    assert claims.loc["B2", "estimate"] == pytest.approx(0.1, abs=0.005)
    open_on_one = judged(*tables(two_datasets({"short": {64: {"offsets": (0.0,)}}})), ["B2"])
    assert open_on_one.loc["B2", "verdict"] == "inconclusive"


def test_small_and_long_data_are_chosen_by_size():
    # Only on the long set do the losses differ.
    claims = judged(
        *tables(two_datasets({"long": {64: {"floor": 2.1}}, "short": {1: {"floor": 2.0, "leaves_at": None}}}))
    )
    assert claims.loc["A7", "verdict"] == "confirmed"
    assert claims.loc["A7", "reason"].startswith("tiny/short (fewest tokens of 2 datasets)")


def test_shorter_runs_are_left_out_where_there_are_full_ones():
    short, full, longer = (SimpleNamespace(runs=pd.DataFrame({"steps": [steps]})) for steps in (999, 1000, 3000))
    assert full_runs([("short", short), ("full", full), ("longer", longer)]) == [("full", full), ("longer", longer)]
    assert full_runs([("short", short)]) == [("short", short)]


def test_mixed_tokenizers_and_repeated_ids_are_refused():
    runs, curves = world()
    mixed = runs.assign(tokenizer_sha256=np.where(runs["method"] == "lora", "aaa", "bbb"))
    with pytest.raises(UserError, match="tiny/instruct have different tokenizers, aaa, bbb"):
        judge_claims(Tables(mixed, curves))
    with pytest.raises(UserError, match="more than once"):
        judge_claims(Tables(pd.concat([runs, runs.iloc[:1]]), curves))


def test_claims_have_unique_ids_and_say_everything():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert all((claim.statement, claim.figure, claim.criterion, claim.needs, claim.paper_value, claim.unit))
