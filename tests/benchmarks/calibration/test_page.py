"""The table of a calibration on its page."""

from __future__ import annotations

from benchmarks.calibration.page import END, START, block
from benchmarks.calibration.run import calibrate


def test_a_row_per_claim_and_bold_where_verdicts_are_surely_wrong():
    table = calibrate(1, ["E2"])
    table.loc[table["effect"] == 2, ["wrong", "wrong_low"]] = 0.3, 0.2
    lines = block(table, "2026-01-02").splitlines()
    assert (lines[0], lines[-1]) == (START, END)
    assert "Made on 2026-01-02, with 1 worlds" in lines[2]
    assert "1 surely has more than 5%" in lines[2]
    [row] = [line for line in lines if line.startswith("| E2")]
    assert row.count("**30.0%**") == 1
    assert row.count("|") == 9
