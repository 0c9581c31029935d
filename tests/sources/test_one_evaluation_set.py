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


def verdicts(tables, out):
    lorabench("claims", "--tables", tables, "--out", out / "verdicts")
    return read_table(out / "verdicts", "claims").set_index("claim_id")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["final_test_nll", "final_train_nll"])
def test_it_is_judged_and_drawn(loss, source, tmp_path):
    tables = imported(source(ROWS, COLUMNS.replace("final_test_nll", loss)), tmp_path)
    # Nothing is written for what the source lacks.
    assert not {"final_valid_nll", "experiments", "wall_s"} & set(read_table(tables, "runs"))
    judged = verdicts(tables, tmp_path).loc["B2"]
    assert judged["verdict"] != "not tested"
    assert ONE_SET in judged["reason"]
    said = lorabench("figure", "all", "--tables", tables, "--out", tmp_path / "figures")
    assert "figure fig1_envelopes is not drawn: no validation curves beyond step 0" in said
    assert (tmp_path / "figures/fig2_lr_by_rank.svg").is_file()
    lorabench("claims", "--tables", tables, "--out", tmp_path / "again", "--noise", tables)
    lorabench("merge", tables, "--out", tmp_path / "merged")
    assert set(read_table(tmp_path / "merged", "runs")) == set(read_table(tables, "runs"))


def test_predictions_are_compared_with_it_and_the_reason_names_what_it_does_not_say(source, tmp_path):
    model = {"scale": "1B", "parameters": 10**9, "hidden_size": 2048}
    said = {"precision": "unknown", "schedule": "constant", "alpha": "32", "base_kind": "mixed"}
    rows = [f"{line},lr_ratio rank" for line in ROWS]
    tables = imported(source(rows, f"{COLUMNS},experiments", models={"m": model}, attributes=said), tmp_path)
    reason = verdicts(tables, tmp_path).loc["B2", "reason"]
    assert reason.count("the precision of its runs is unknown, so they may differ in it") == 1
    assert reason.count("its runs differ in base_kind, and the source does not say which has which") == 1
    assert (pd.read_csv(tmp_path / "verdicts/predictions.csv")["ratio"] > 1).all()


def test_a_source_that_lacks_a_column_is_not_tested(source, tmp_path):
    kept = [place for place, name in enumerate(COLUMNS.split(",")) if name != "lr"]
    lines = [",".join(line.split(",")[place] for place in kept) for line in [COLUMNS, ROWS[0], ROWS[-1]]]
    tables = imported(source(lines[1:], lines[0]), tmp_path)
    assert verdicts(tables, tmp_path).loc["B2", "reason"] == "the runs table has no column lr"
    said = lorabench("figure", "all", "--tables", tables, "--out", tmp_path / "figures")
    assert "figure fig2_lr_by_rank is not drawn: the runs table has no column lr" in said
