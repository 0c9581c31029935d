"""Tables made by hand, as for runs of another project, are read in the documented types or refused in one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.store.checks import check_table
from lorabench.store.io import read_table, write_csv, write_frame
from lorabench.store.schemas import SCHEMAS, description

from ..handmade import curves_of, make_sweep, runs_table

RUNS = runs_table(make_sweep(None) + make_sweep(1) + make_sweep(8))
CURVES = curves_of(RUNS)
LOSSES = pd.DataFrame({"run_id": RUNS["run_id"], "example": 0, "loss": 2.0, "tokens": 3})
FIRST, THIRD = RUNS["run_id"].iloc[0], RUNS["run_id"].iloc[2]


def with_value(column: str, value: object, row: int = 2) -> pd.DataFrame:
    changed = RUNS.assign(**{column: RUNS[column].astype(object)})
    changed.loc[row, column] = value
    return changed


def write(folder: Path, runs: pd.DataFrame | bytes = RUNS, kind: str = "csv", **others: pd.DataFrame) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"runs.{kind}"
    if isinstance(runs, bytes):
        path.write_bytes(runs)
    elif kind == "csv":
        write_csv(runs, path)
    else:
        runs.to_parquet(path)
    for name, table in ({"curves": CURVES} | others).items():
        table.to_parquet(folder / f"{name}.parquet")
    return folder


TWICE = pd.concat([RUNS, RUNS.iloc[[2]]])
OTHER_DATA = RUNS.assign(dataset_sha256=np.where(RUNS["method"] == "lora", "aaa", "bbb"))
TWO_POINTS = pd.concat([CURVES, CURVES.iloc[[3]].assign(value=9.0)])
# The beginning of the error message, in which `{path}` stands for the file, and what is written.
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "run twice": (f"the runs table has these run_ids more than once: {THIRD}", {"runs": TWICE, "kind": "parquet"}),
    "run without id": ("the runs table has 1 runs without a run_id", {"runs": with_value("run_id", None)}),
    "no loss": (
        f"run_id {THIRD}: final_test_nll = missing; allowed: a finite number where status is done",
        {"runs": with_value("final_test_nll", None)},
    ),
    "lora without rank": (
        f"run_id {FIRST}: rank = missing; allowed: whole numbers from 1 up for lora, none for fullft",
        {"runs": with_value("method", "lora", row=0)},
    ),
    "negative lr": (f"run_id {THIRD}: lr = -0.001; allowed: numbers above 0", {"runs": with_value("lr", -0.001)}),
    "semicolons": ("{path} has its columns separated by semicolons; allowed", {"runs": b"run_id;lr\na;0.1\n"}),
    "longer rows": ("{path} can't be read as a table: Length of", {"runs": b"run_id,lr\na,0.1,2\nb,0.1,2\n"}),
    "datasets": ("runs of instruct have different datasets under one name, aaa, bbb: not", {"runs": OTHER_DATA}),
    "text as a number": ("{path}: column lr has 'fast', which is not a number", {"runs": with_value("lr", "fast")}),
    "no steps": ("the curves table has no column step", {"curves": CURVES.drop(columns="step")}),
    "a step before all": (
        f"run_id {FIRST}: step = -1; allowed: whole numbers from 0 up",
        {"curves": CURVES.assign(step=[-1, *CURVES["step"][1:]])},
    ),
    "a loss below 0": (
        f"run_id {FIRST}: value = -2.0; allowed: an NLL from 0 up",
        {"curves": CURVES.assign(value=[-2.0, *CURVES["value"][1:]])},
    ),
    "no example": ("the test_losses table has no column example", {"test_losses": LOSSES.drop(columns="example")}),
    "no tokens": (
        f"run_id {FIRST}: tokens = -1.0; allowed: numbers from 0 to 1e+15",
        {"test_losses": LOSSES.assign(tokens=-1)},
    ),
    "a point twice": (
        f"the curves table has validation nll of step 3 of run_id {FIRST} more than once",
        {"curves": TWO_POINTS},
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_table_is_refused_and_what_was_there_stays(kind: str, tmp_path: Path):
    message, written = BAD[kind]
    tables, out = write(tmp_path / "tables", **written), tmp_path / "out"
    out.mkdir()
    (out / "claims.csv").write_text("as it was")
    # Both commands check tables by the same code, so `figure` is tested with one mistake only.
    command = ["figure", "fig1_envelopes"] if kind == "a point twice" else ["claims"]
    result = CliRunner().invoke(app, [*command, "--tables", str(tables), "--out", str(out)])
    assert result.exit_code == 2
    path = tables / f"runs.{written.get('kind', 'csv')}"
    assert result.stderr.startswith("lorabench: " + message.replace("{path}", str(path)))
    assert result.stderr.count("\n") == 1
    assert {path.name: path.read_text() for path in out.iterdir()} == {"claims.csv": "as it was"}


def test_one_dataset_may_stand_next_to_others_and_one_model_on_many():
    other = RUNS.assign(run_id=RUNS["run_id"] + "x", dataset="worked", dataset_sha256="bbb", tokenizer_sha256="t")
    check_table(pd.concat([RUNS.assign(dataset_sha256="aaa", tokenizer_sha256="t"), other]))


def test_every_column_has_a_meaning_which_its_parquet_file_holds_too(tmp_path: Path):
    for name, schema in SCHEMAS.items():
        assert [column.name for column in schema if len(description(column)) < 5 or "  " in description(column)] == []
        write_frame(pd.DataFrame(columns=schema.names), name, tmp_path)
        written = pq.read_schema(tmp_path / f"{name}.parquet")
        assert list(map(description, written)) == list(map(description, schema)), name


def test_tables_come_back_as_they_were_written(tmp_path: Path):
    # Ids that look like numbers, and numbers without a short decimal form.
    ids = [f"{number:012d}" for number in range(len(RUNS) - 1)] + ["1234567890e1"]
    runs = RUNS.assign(run_id=ids, lr=RUNS["lr"] / 3)
    # Columns that pandas kept as its index are columns.
    for kind, frame in (("csv", runs), ("parquet", runs), ("parquet", runs.set_index(["run_id", "lr"]))):
        read = read_table(write(tmp_path / kind, frame, kind), "runs")
        assert read["run_id"].tolist() == ids
        assert read["lr"].tolist() == runs["lr"].tolist()
        assert read["final_test_nll"].equals(runs["final_test_nll"])
        assert str(read["rank"].dtype) == "Int64"
        assert read["placement"].iloc[0] is None
        assert [list(names) for names in read["experiments"]] == [["rank"]] * len(runs)
