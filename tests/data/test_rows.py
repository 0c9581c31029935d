"""The pipeline of rows: each row is used or counted once, by one reason, whatever its source."""

from __future__ import annotations

from lorabench.data.chat import UnusableRowError
from lorabench.data.files import REPEATED, RawRow, Tally, json_lines, usable


def number(content):
    if content["n"] < 0:
        raise UnusableRowError("negative")
    return content["n"]


ROWS = [
    RawRow(1, "not JSON"),
    RawRow(3, {"n": 1, "other": None}),
    RawRow(4, {"n": -1}),
    RawRow(5, {"n": 1}),
    RawRow(6, {"n": -2}),
    RawRow(7, {"n": 2}),
]


def test_rows_are_used_or_counted_by_reason_and_first_place():
    tally = Tally("numbers")
    assert list(usable(ROWS, number, tally, identity=lambda value: value)) == [(3, 1), (7, 2)]
    assert (tally.rows, tally.usable, tally.columns) == (6, 2, ("n", "other"))
    assert tally.bad == {"not JSON": (1, 1), "negative": (2, 4), REPEATED: (1, 5)}
    assert str(tally) == (
        "2 of 6 rows can be used as numbers; left out: 2 negative (first: line 4), 1 not JSON (line 1), "
        "1 repeats the prompt of an earlier row (line 5)"
    )


def test_without_an_identity_equal_examples_are_all_used():
    tally = Tally("numbers")
    assert [example for _, example in usable(ROWS, number, tally)] == [1, 1, 2]
    assert REPEATED not in tally.bad


def test_rows_left_out_later_keep_the_first_place():
    tally = Tally("numbers", unit="row")
    tally.leave_out(9, "late", rows=3)
    tally.leave_out(4, "late")
    assert tally.plain()["bad"] == [{"reason": "late", "rows": 4, "first": 4}]
    assert tally.reasons() == "4 late (first: row 4)"


def test_lines_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"n": "\u2028"}\n\n[]\n'.encode())
    assert list(json_lines(path)) == [RawRow(1, {"n": "\u2028"}), RawRow(3, "not a JSON object")]
