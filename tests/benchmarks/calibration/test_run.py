"""A small calibration: few wrong verdicts, the same table from the same seed, and work that is not done twice."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from benchmarks.calibration import run
from benchmarks.calibration.noise import NoiseLevels
from benchmarks.calibration.run import Making, Seen, counted, shares, twins
from benchmarks.calibration.seeds import SeedNoise
from benchmarks.calibration.traits import PLAIN
from lorabench.errors import UserError

CLAIMS = ["B1", "B2", "B3"]  # of one scene, so that each world is judged for all three


@pytest.mark.long
def test_verdicts_are_rarely_wrong():
    quiet = replace(NoiseLevels(), seeds=SeedNoise(0.01, 0.005, 0.001, 0.001, 0.002))
    table = shares(counted(20, CLAIMS, making=Making(quiet, PLAIN, seed=1))).set_index(["claim_id", "effect"])
    assert (table["wrong_low"] <= 0.05).all()
    assert table.loc["B1", "power"][[0.0, 2.0]].min() > 0.8
    assert table.loc["B2", "truth"].tolist() == ["true", "true", "at the margin", "false"]
    verdicts = ["confirmed", "right_sign", "inconclusive", "contradicted", "setting_not_met", "not_tested"]
    assert table[verdicts].sum(axis=1).tolist() == pytest.approx([1.0] * 12)
    assert (table["setting_not_met"] + table["not_tested"] == 0).all()


def test_one_seed_gives_one_table_by_any_number_of_processes_and_a_claim_not_covered_is_refused(monkeypatch):
    monkeypatch.setattr(run, "EFFECTS", (0.0, 2.0))
    assert counted(2, ["C2"], processes=2) == counted(2, ["C2"])
    with pytest.raises(UserError, match="does not cover E6; allowed: A1, "):
        counted(2, ["E6"])


def test_wrong_and_right_verdicts_are_counted_by_the_truth():
    """Of ten worlds each: all six words, in a claim of equality and one of a difference."""
    verdicts = {"confirmed": 4, "contradicted": 1, "not seen here": 2, "right sign, below the margin": 1}
    verdicts["inconclusive"] = 2
    counts = {}
    for claim_id, effect in product(("B2", "E1"), (0.0, 0.5, 1.0, 2.0)):
        seen = {Seen(claim_id, verdict, -1, True): n for verdict, n in verdicts.items()}
        counts[claim_id, effect] = Counter(seen)
    table = shares(counts).set_index(["claim_id", "effect"])
    assert table.loc["B2", "wrong"].tolist() == pytest.approx([0.3, 0.3, 0.4, 0.4 + 0.1])
    assert table.loc["B2", "power"].tolist() == pytest.approx([0.4, 0.4, float("nan"), 0.3], nan_ok=True)
    assert table.loc["E1", "wrong"].tolist() == pytest.approx([0.5, 0.4, 0.4, 0.4])
    assert table.loc["E1", "power"].tolist() == pytest.approx([0.3, 0.4, 0.4, 0.4])


def test_twins_are_counted_by_the_stated_probability():
    counts = {
        ("B2", 0.0): Counter({Seen("B2", "confirmed", 18, True): 9, Seen("B2", "confirmed", 18, False): 1}),
        ("E1", 0.0): Counter({Seen("E1", "inconclusive", -1, True): 5, Seen("E1", "confirmed", 11, False): 2}),
    }
    table = twins(counts)
    whole = table[table["claim_id"] == "all"]
    assert whole["n_worlds"].tolist() == [2, 10]
    assert whole["predicted"].tolist() == pytest.approx([0.575, 0.925])
    assert whole["same"].tolist() == pytest.approx([0.0, 0.9])
    assert table.loc[table["claim_id"] == "B2", "n_worlds"].tolist() == [10]
