"""A source with one evaluation set goes through the commands from its table to verdicts and figures."""

from __future__ import annotations

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorabench.cli import app
from lorabench.store.io import read_table

from .conftest import COLUMNS, row

ONE_SET = "one evaluation set: the LR was picked on the loss that is reported"
ROWS = [
    row(method, lr, 2.0 + 0.1 * abs(place - 2) + 0.001 * seed, seed)
    for method, lrs in (("fullft", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)), ("lora", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)))
    for place, lr in enumerate(lrs)
    for seed in range(3)
]


def lorabench(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def imported(folder, out):
    lorabench("import", folder, "--out", out / "tables")
    return out / "tables"


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["final_test_nll", "final_train_nll"])
def test_it_is_judged_and_drawn(loss, source, tmp_path):
    tables = imported(source(ROWS, COLUMNS.replace("final_test_nll", loss)), tmp_path)
    # Nothing is written for what the source lacks.
    assert not {"final_valid_nll", "experiments", "wall_s"} & set(read_table(tables, "runs"))
    lorabench("claims", "--tables", tables, "--out", tmp_path / "verdicts")
    verdicts = read_table(tmp_path / "verdicts", "claims").set_index("claim_id")
    assert verdicts.loc["B2", "verdict"] != "not tested"
    assert ONE_SET in verdicts.loc["B2", "reason"]
    said = lorabench("figure", "all", "--tables", tables, "--out", tmp_path / "figures")
    assert "figure fig1_envelopes is not drawn: no validation curves beyond step 0" in said
    assert (tmp_path / "figures/fig2_lr_by_rank.svg").is_file()
    lorabench("claims", "--tables", tables, "--out", tmp_path / "again", "--noise", tables)
    lorabench("merge", tables, "--out", tmp_path / "merged")
    assert set(read_table(tmp_path / "merged", "runs")) == set(read_table(tables, "runs"))


def test_predictions_are_compared_with_it(source, tmp_path):
    model = {"scale": "1B", "parameters": 10**9, "hidden_size": 2048}
    rows = [f"{line},lr_ratio" for line in ROWS]
    tables = imported(source(rows, f"{COLUMNS},experiments", models={"m": model}), tmp_path)
    lorabench("claims", "--tables", tables, "--out", tmp_path / "verdicts")
    assert (pd.read_csv(tmp_path / "verdicts/predictions.csv")["ratio"] > 1).all()


def test_a_source_that_lacks_a_column_is_not_tested(source, tmp_path):
    kept = [place for place, name in enumerate(COLUMNS.split(",")) if name != "lr"]
    lines = [",".join(line.split(",")[place] for place in kept) for line in [COLUMNS, ROWS[0], ROWS[-1]]]
    tables = imported(source(lines[1:], lines[0]), tmp_path)
    lorabench("claims", "--tables", tables, "--out", tmp_path / "verdicts")
    verdicts = read_table(tmp_path / "verdicts", "claims").set_index("claim_id")
    assert verdicts.loc["B2", "reason"] == "the runs table has no column lr"
    said = lorabench("figure", "all", "--tables", tables, "--out", tmp_path / "figures")
    assert "figure fig2_lr_by_rank is not drawn: the runs table has no column lr" in said


@pytest.mark.parametrize(
    ("attribute", "value", "remark"),
    [
        ("precision", "unknown", "the {} of its runs is unknown, so they may differ in it"),
        ("base_kind", "mixed", "its runs differ in {}, and the source does not say which has which"),
    ],
)
def test_what_a_source_does_not_say_is_in_the_reason(attribute, value, remark, source, tmp_path):
    said = {"precision": "fp32 weights", "schedule": "constant", "alpha": "32", "base_kind": "base", attribute: value}
    tables = imported(source(ROWS, attributes=said), tmp_path)
    lorabench("claims", "--tables", tables, "--out", tmp_path / "verdicts")
    verdicts = read_table(tmp_path / "verdicts", "claims").set_index("claim_id")
    assert verdicts.loc["B2", "reason"].count(remark.format(attribute)) == 1
