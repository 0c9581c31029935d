"""Tables made by hand, as for runs of another project, are read in the documented types or refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.cli import app
from lorabench.errors import UserError
from lorabench.figures.catalog import save_figure
from lorabench.store.checks import check_curves, check_table
from lorabench.store.io import read_table, write_csv
from lorabench.store.schemas import EVALS, SCHEMAS
from lorabench.store.tables import Tables

from ..conftest import REPOSITORY
from ..handmade import curves_of, evals_table, make_eval, make_sweep, runs_table

RUNS = runs_table(make_sweep(None) + make_sweep(1) + make_sweep(8))
CURVES = curves_of(RUNS)
FIRST, THIRD = RUNS["run_id"].iloc[0], RUNS["run_id"].iloc[2]


def with_value(column: str, value: object, row: int = 2, frame: pd.DataFrame = RUNS) -> pd.DataFrame:
    """Return the runs with one value replaced by a value of any type."""
    changed = frame.assign(**{column: frame[column].astype(object)})
    changed.loc[row, column] = value
    return changed


def write(folder: Path, runs: pd.DataFrame | bytes, kind: str = "csv", curves: pd.DataFrame = CURVES) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"runs.{kind}"
    if isinstance(runs, bytes):
        path.write_bytes(runs)
    elif kind == "csv":
        write_csv(runs, path)
    else:
        runs.to_parquet(path)
    curves.to_parquet(folder / "curves.parquet")
    return folder


NUMBER = "finite number where status is done"
# The kind of a file, its content, and the error message; `{path}` stands for the file.
BAD: dict[str, tuple[str, pd.DataFrame | bytes, str]] = {
    "run twice": (
        "parquet",
        pd.concat([RUNS, RUNS.iloc[[2]]]),
        f"the runs table has these run_ids more than once: {THIRD}",
    ),
    "run without id": ("csv", with_value("run_id", None), "the runs table has 1 runs without a run_id"),
    "no loss": (
        "csv",
        with_value("final_test_nll", None),
        f"run_id {THIRD}: final_test_nll = missing; allowed: a {NUMBER}",
    ),
    "status": ("csv", with_value("status", "ok"), f"run_id {THIRD}: status = 'ok'; allowed: done, diverged"),
    "lora without rank": (
        "csv",
        with_value("method", "lora", row=0),
        f"run_id {FIRST}: rank = missing; allowed: whole numbers from 1 up for lora, none for fullft",
    ),
    "negative lr": ("csv", with_value("lr", -0.001), f"run_id {THIRD}: lr = -0.001; allowed: numbers above 0"),
    "datasets": (
        "csv",
        RUNS.assign(dataset_sha256=np.where(RUNS["method"] == "lora", "aaa", "bbb")),
        "runs of instruct have different datasets under one name, aaa, bbb: not comparable",
    ),
    "text as a number": (
        "csv",
        with_value("lr", "fast"),
        "{path}: column lr has 'fast', which is not a number",
    ),
    "a seed beyond all": (
        "csv",
        with_value("seed", 1e300),
        "{path}: column seed has 1e+300, which is not a whole number",
    ),
    "a number as a list": (
        "parquet",
        RUNS.assign(experiments=5),
        "{path}: column experiments has 5, which is not a list of words",
    ),
    "empty file": ("csv", b"", "{path} can't be read as a table: No columns to parse from file"),
    "no parquet": ("parquet", b"run_id,lr\na,0.1\n", "{path} can't be read as a table: "),
}


# Both commands check tables by the same code, so `figure` is tested with a few kinds of mistakes only.
@pytest.mark.parametrize(
    ("command", "kind"),
    [*(("claims", kind) for kind in BAD), ("figure", "datasets"), ("figure", "empty file")],
)
def test_a_bad_table_is_refused_and_what_was_there_stays(kind: str, command: str, tmp_path: Path):
    suffix, content, message = BAD[kind]
    tables, out = write(tmp_path / "tables", content, suffix), tmp_path / "out"
    out.mkdir()
    names = ["claims.csv", "claims.parquet", "fig1_envelopes.svg", "fig1_envelopes.png", "fig1_envelopes.csv"]
    for name in names:
        (out / name).write_bytes(b"as it was")
    arguments = ["claims"] if command == "claims" else ["figure", "fig1_envelopes"]
    result = CliRunner().invoke(app, [*arguments, "--tables", str(tables), "--out", str(out)])
    assert result.exit_code == 2
    assert result.stderr.startswith("lorabench: " + message.replace("{path}", str(tables / f"runs.{suffix}")))
    assert result.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == dict.fromkeys(names, b"as it was")


def test_the_table_behind_the_bad_ones_is_good(tmp_path: Path):
    for kind in ("csv", "parquet"):
        tables = Tables.read(write(tmp_path / kind, RUNS, kind))
        check_table(tables.runs)
        check_curves(tables.curves)


def test_columns_that_are_absent_are_not_checked():
    for column in RUNS.columns:
        check_table(RUNS.drop(columns=column))
        check_table(RUNS.drop(columns=list({"run_id", column})))


def test_one_dataset_may_stand_beside_others_and_one_model_on_many(tmp_path: Path):
    other = RUNS.assign(run_id=RUNS["run_id"] + "x", dataset="worked", dataset_sha256="bbb", tokenizer_sha256="t")
    check_table(pd.concat([RUNS.assign(dataset_sha256="aaa", tokenizer_sha256="t"), other]))
    # One name for different data is refused across models too.
    elsewhere = other.assign(model="other", dataset="instruct")
    with pytest.raises(UserError, match="runs of instruct have different datasets under one name, aaa, bbb"):
        check_table(pd.concat([RUNS.assign(dataset_sha256="aaa"), elsewhere]))


def test_the_page_of_tables_describes_every_column():
    page = (REPOSITORY / "docs/tables.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", page, re.M | re.S))
    for name, schema in SCHEMAS.items():
        assert [column for column in schema.names if f"`{column}`" not in sections[name]] == [], name


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


def test_a_truth_value_is_one(tmp_path: Path):
    (tmp_path / "counts.csv").write_text("architecture,include_unembedding\na,True\nb,\nc,False\n")
    assert read_table(tmp_path, "counts")["include_unembedding"].tolist() == [True, pd.NA, False]
    (tmp_path / "counts.csv").write_text("architecture,include_unembedding\na,True\nb,maybe\n")
    with pytest.raises(UserError, match="column include_unembedding has 'maybe', which is not a truth value"):
        read_table(tmp_path, "counts")


def test_a_name_for_two_columns_is_refused(tmp_path: Path):
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["run_id", "run_id"]), tmp_path / "runs.parquet")
    with pytest.raises(UserError, match="can't be read as a table: Multiple matches for .*run_id"):
        read_table(tmp_path, "runs")


BAD_CURVES: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "no steps": (lambda curves: curves.drop(columns="step"), "the curves table has no column step"),
    "a point twice": (
        lambda curves: pd.concat([curves, curves.iloc[[3]].assign(value=9.0)]),
        f"the curves table has validation nll of step 3 of run_id {FIRST} more than once",
    ),
}


@pytest.mark.parametrize("kind", BAD_CURVES)
def test_bad_curves_are_refused(kind: str, tmp_path: Path):
    change, message = BAD_CURVES[kind]
    folder = write(tmp_path / "tables", RUNS, curves=change(CURVES))
    with pytest.raises(UserError, match=message):
        judge_claims(Tables.read(folder))
    with pytest.raises(UserError, match=message):
        save_figure("fig1_envelopes", [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_curves_of_other_runs_and_columns_that_curves_lack_change_nothing():
    claims = [claim for claim in CLAIMS if claim.id == "A1"]
    stray = CURVES.assign(run_id="stray-" + CURVES["run_id"], value=0.0)
    expected = judge_claims(Tables(RUNS, CURVES), claims)
    for curves in (pd.concat([CURVES, stray]), CURVES.drop(columns=["examples", "tokens"])):
        pd.testing.assert_frame_equal(judge_claims(Tables(RUNS, curves), claims), expected)


def test_a_figure_draws_its_own_experiment_and_says_if_there_is_none(tmp_path: Path):
    other = RUNS.assign(run_id="other-" + RUNS["run_id"], experiments=[["batch_size"]] * len(RUNS), batch_size=64)
    save_figure("fig2_lr_by_rank", [write(tmp_path / "one", RUNS)], tmp_path / "own")
    save_figure("fig2_lr_by_rank", [write(tmp_path / "both", pd.concat([RUNS, other]), "parquet")], tmp_path / "merged")
    csv = [(tmp_path / folder / "fig2_lr_by_rank.csv").read_text() for folder in ("own", "merged")]
    assert csv[0] == csv[1]
    with pytest.raises(UserError, match="no runs of the experiment rank"):
        save_figure("fig2_lr_by_rank", [write(tmp_path / "other", other)], tmp_path / "none")
    with pytest.raises(UserError, match="the runs table has no column seed"):
        save_figure("fig2_lr_by_rank", [write(tmp_path / "seedless", RUNS.drop(columns="seed"))], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_evaluations_are_collected_base_first_in_the_order_of_their_tasks(tmp_path: Path):
    files = []
    for rank in (8, None, "base"):
        rows = [make_eval(rank, 0.5), make_eval(rank, 0.4, task="aime24", stderr=None)]
        files.append(tmp_path / f"{rank}.parquet")
        pq.write_table(pa.Table.from_pandas(evals_table(rows), schema=EVALS), files[-1])
    arguments = ["step", "collect-evals", *map(str, files), "--out", str(tmp_path / "tables")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    for kind in ("csv", "parquet"):
        (tmp_path / kind).mkdir()
        (tmp_path / "tables" / f"evals.{kind}").rename(tmp_path / kind / f"evals.{kind}")
        evals = Tables.read(tmp_path / kind).evals
        assert evals["method"].tolist() == [None, None, "fullft", "fullft", "lora", "lora"]
        assert evals["task"].tolist() == ["lorabench_instruct", "aime24"] * 3
        assert evals["rank"].tolist() == [pd.NA] * 4 + [8, 8]
        assert evals["higher_is_better"].all()


def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path):
    pq.write_table(pa.table({"run_id": ["a"]}), tmp_path / "a.parquet")
    result = CliRunner().invoke(
        app, ["step", "collect-evals", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "tables")]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith(f"lorabench: {tmp_path}/a.parquet is no evaluation: it has no column model, ")
    assert not (tmp_path / "tables").exists()
