"""A small calibration: few wrong verdicts, the same table from the same seed, and work that is not done twice."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.calibration import run
from benchmarks.calibration.run import calibrate
from lorabench.errors import UserError

CLAIMS = ["B1", "B2", "B3"]  # of one scene, so that each world is judged for all three


@pytest.mark.slow
def test_verdicts_are_rarely_wrong():
    table = calibrate(20, CLAIMS, seed=1).set_index(["claim_id", "effect"])
    assert (table["wrong_low"] <= 0.05).all()
    assert table.loc["B3", "power"].drop(1).min() > 0.8
    assert table.loc["B2", "truth"].tolist() == ["true", "at the margin", "false"]
    shares = table[["confirmed", "contradicted", "inconclusive", "setting_not_met", "not_tested"]]
    assert shares.sum(axis=1).tolist() == pytest.approx([1.0] * 9)
    assert (table["setting_not_met"] + table["not_tested"] == 0).all()


def test_one_seed_gives_one_table_and_an_interrupted_calibration_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHUNK", 1)
    whole = calibrate(2, ["E2"], processes=2)
    kept = tmp_path / "kept"
    calibrate(1, ["E2"], kept=kept)
    with kept.open("a") as file:
        file.write(f"{kept.read_text().splitlines()[0].split(chr(9))[0]}x\tE2\tconfirmed\t1\n")  # cut off in the middle
    judged, original = [], run.worlds_of
    monkeypatch.setattr(run, "worlds_of", lambda task, *rest: judged.append(task) or original(task, *rest))
    again = calibrate(2, ["E2"], kept=kept)
    pd.testing.assert_frame_equal(whole, again)
    assert [task.first for task in judged] == [1, 1, 1]  # the second world of each effect


def test_a_claim_that_is_not_covered_is_refused():
    with pytest.raises(UserError, match="does not cover E6; allowed: A1, "):
        calibrate(1, ["E6"])
