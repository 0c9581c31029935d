"""Merged tables: rows of several folders are united, and a contradiction is refused in one sentence."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.errors import UserError
from lorabench.figures.catalog import save_figure
from lorabench.store.io import write_csv
from lorabench.store.schemas import PARQUET_ONLY, SCHEMAS
from lorabench.store.tables import KEYS, Tables, merge

from ..handmade import curves_of, evals_table, make_eval, make_run, make_sweep, runs_table

COMPUTE = pd.DataFrame(
    [
        {"model": "tiny", "method": "fullft", "rank": None, "placement": None, "linear_flops": 3.0e9, "step_s": 0.3},
        {"model": "tiny", "method": "lora", "rank": 1, "placement": "all", "linear_flops": 2.1e9, "step_s": 0.2},
        {"model": "tiny", "method": "lora", "rank": 8, "placement": "all", "linear_flops": 2.4e9, "step_s": 0.2},
    ]
).astype({"rank": "Int64"})
COUNTS = pd.DataFrame(
    [
        {
            "architecture": "8b",
            "placement": "all",
            "part": "all",
            "rank": 1,
            "include_unembedding": flag,
            "trainable_params": n,
        }
        for flag, n in ((True, 2_753_792), (False, 2_621_440))
    ]
)
RUNS = runs_table(make_sweep(None) + make_sweep(8) + make_sweep(8, dataset="worked"))
CURVES = curves_of(RUNS)
TEST_LOSSES = pd.DataFrame(
    [
        {"run_id": run_id, "example": number, "loss": 10.5 + number, "tokens": 4}
        for run_id in RUNS["run_id"].iloc[:2]
        for number in range(3)
    ]
)


def write(folder: Path, kind: str = "parquet", **tables: pd.DataFrame) -> Path:
    """Write tables as files of one kind, each with its own columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        if kind == "csv":
            write_csv(frame, folder / f"{name}.csv")
        else:
            frame.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


def merged(*folders: Path) -> Tables:
    out = folders[0].parent / "out"
    merge(list(folders), out)
    return Tables.read(out)


def same(table: pd.DataFrame, other: pd.DataFrame, name: str) -> None:
    """Assert that two tables have the same rows in any order, in the documented columns."""
    keys = KEYS[name]
    columns = [column for column in SCHEMAS[name].names if column in table or column in other]
    tables = [
        frame.reindex(columns=columns).sort_values([key for key in keys if key in columns], ignore_index=True)
        for frame in (table, other)
    ]
    pd.testing.assert_frame_equal(*tables, check_dtype=False)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    parts=st.lists(st.sets(st.integers(0, len(RUNS) - 1), min_size=1), min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(["parquet", "csv"]), min_size=4, max_size=4),
)
def test_merging_the_parts_of_a_table_gives_it_back(parts, kinds):
    """The parts may overlap, and together they hold every run."""
    missing = set(range(len(RUNS))) - set.union(*parts)
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for number, rows in enumerate([*parts, missing] if missing else parts):
            runs = RUNS.iloc[sorted(rows)]
            curves = CURVES[CURVES["run_id"].isin(runs["run_id"])]
            folders.append(write(Path(scratch) / str(number), kinds[number], runs=runs, curves=curves))
        result = merged(*folders)
        whole = Tables.read(write(Path(scratch) / "whole", runs=RUNS, curves=CURVES))
    same(result.runs, whole.runs, "runs")
    same(result.curves, whole.curves, "curves")


def test_merging_again_changes_nothing(tmp_path):
    one = write(tmp_path / "one", "csv", runs=RUNS.iloc[:7], curves=CURVES, compute=COMPUTE.iloc[:2], counts=COUNTS)
    others = {"evals": evals_table([make_eval(8, 0.5)]), "test_losses": TEST_LOSSES}
    two = write(tmp_path / "two", runs=RUNS.iloc[4:], compute=COMPUTE.iloc[1:], **others)
    once, twice = tmp_path / "once", tmp_path / "twice"
    merge([one, two], once)
    merge([once, one, two], twice)
    files = {path.name: path.read_bytes() for path in once.iterdir()}
    csv = {f"{name}.csv" for name in KEYS if name not in PARQUET_ONLY}
    assert set(files) == csv | {f"{name}.parquet" for name in KEYS}
    assert {path.name: path.read_bytes() for path in twice.iterdir()} == files
    merge([once], once)
    assert {path.name: path.read_bytes() for path in once.iterdir()} == files


def test_a_run_has_the_experiments_of_all_and_the_first_machine(tmp_path):
    here = runs_table([make_run(8, 1e-3, experiments=["rank"], host="here", wall_s=10.0)])
    there = runs_table([make_run(8, 1e-3, experiments=["batch_size", "rank"], host="there", wall_s=20.0)])
    [run] = merged(write(tmp_path / "a", runs=here), write(tmp_path / "b", runs=there)).runs.to_dict("records")
    assert list(run["experiments"]) == ["rank", "batch_size"]
    assert (run["host"], run["wall_s"]) == ("here", 10.0)


@pytest.mark.parametrize(
    ("column", "value", "contradiction"),
    [
        ("final_test_nll", 2.5, "final_test_nll = 2.25 in {a} and 2.5 in {b}"),
        ("status", "diverged", "status = 'done' in {a} and 'diverged' in {b}"),
        ("alpha", math.nan, "alpha = 32.0 in {a} and nan in {b}"),
    ],
)
def test_other_results_of_one_run_are_refused(tmp_path, column, value, contradiction):
    runs = runs_table([make_run(4, 1e-3), make_run(8, 1e-3, run_id="abc", final_test_nll=2.25)])
    a, b = write(tmp_path / "a", runs=runs), write(tmp_path / "b", "csv", runs=runs.iloc[1:].assign(**{column: value}))
    with pytest.raises(UserError) as refused:
        merge([a, b], tmp_path / "out")
    assert str(refused.value) == f"runs: run_id abc has {contradiction.format(a=a, b=b)}"
    assert not (tmp_path / "out").exists()


def test_counts_must_agree_and_so_must_flops_but_not_times(tmp_path):
    a = write(tmp_path / "a", compute=COMPUTE, counts=COUNTS)
    result = merged(a, write(tmp_path / "b", compute=COMPUTE.assign(step_s=9.0)))
    assert result.compute["step_s"].tolist() == [0.3, 0.2, 0.2]
    for name, changed in (
        ("compute", COMPUTE.assign(linear_flops=1.0)),
        ("counts", COUNTS.assign(trainable_params=1)),
    ):
        with pytest.raises(UserError, match=f"^{name}: .* = .* in {a} and 1"):
            merge([a, write(tmp_path / "c", **{name: changed})], tmp_path / "no")
        (tmp_path / "c" / f"{name}.parquet").unlink()
    assert not (tmp_path / "no").exists()


def test_columns_may_be_missing_on_one_side(tmp_path):
    bare = RUNS.iloc[:8].drop(columns=["experiments", "alpha", "host"])
    a, b = write(tmp_path / "a", "csv", runs=bare), write(tmp_path / "b", runs=RUNS.iloc[4:].drop(columns="host"))
    result, whole = merged(a, b).runs.set_index("run_id"), RUNS.set_index("run_id")
    assert set(result.index) == set(whole.index)
    assert "host" not in result
    both = whole.index[4:]
    assert result.loc[both, "alpha"].tolist() == pytest.approx(whole.loc[both, "alpha"].tolist(), nan_ok=True)
    assert result.loc[both, "experiments"].map(list).tolist() == [["rank"]] * len(both)
    only_a = whole.index[:4]
    assert result.loc[only_a, "alpha"].isna().all()
    assert result.loc[only_a, "experiments"].tolist() == [[]] * 4
    assert result.loc[only_a, "final_test_nll"].tolist() == whole.loc[only_a, "final_test_nll"].tolist()


def test_tables_that_can_not_be_compared_are_refused(tmp_path):
    a = write(tmp_path / "a", runs=runs_table([make_run(4, 1e-3, tokenizer_sha256="aaa")]))
    b = write(tmp_path / "b", runs=runs_table([make_run(8, 1e-3, tokenizer_sha256="bbb")]))
    with pytest.raises(UserError, match="runs of tiny/instruct have different tokenizers, aaa, bbb"):
        merge([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_merge_where_they_agree_the_base_among_them(tmp_path):
    base, run = make_eval("base", 0.1), make_eval(8, 0.5)
    a = write(tmp_path / "a", evals=evals_table([base, run]))
    b = write(tmp_path / "b", evals=evals_table([base | {"versions": "{}"}, run | {"num_fewshot": 0, "value": 0.4}]))
    assert merged(a, b).evals["value"].tolist() == [0.1, 0.5, 0.4]
    c = write(tmp_path / "c", evals=evals_table([base | {"value": 0.2}]))
    with pytest.raises(UserError, match="evals: model tiny task lorabench_instruct .* has value = 0.1 in"):
        merge([a, c], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_scores_of_two_samplers_are_never_mixed(tmp_path):
    older = evals_table([make_eval("base", 0.1)]).drop(columns="sampler")
    a = write(tmp_path / "a", evals=older)
    b = write(tmp_path / "b", evals=evals_table([make_eval("base", 0.1), make_eval(8, 0.5)]))
    assert merged(a, b).evals["sampler"].tolist() == ["own", "own"]
    c = write(tmp_path / "c", evals=evals_table([make_eval(8, 0.5, sampler="vllm")]))
    with pytest.raises(UserError, match="scores of tiny have different samplers, own, vllm: not comparable"):
        merge([a, c], tmp_path / "none")
    with pytest.raises(UserError, match="scores of tiny have different samplers, own, vllm: not comparable"):
        save_figure("learned_forgotten", [a, c], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_row_must_have_its_keys(tmp_path):
    a = write(tmp_path / "a", compute=COMPUTE.assign(device="cpu"))
    b = write(tmp_path / "b", compute=COMPUTE)
    with pytest.raises(UserError, match=f"the table compute in {b} has no column device"):
        merge([a, b], tmp_path / "out")
    with pytest.raises(UserError, match="the table runs in .* has no column run_id"):
        merge([write(tmp_path / "c", runs=RUNS.drop(columns="run_id"))], tmp_path / "out")


def test_a_folder_without_tables_is_named(tmp_path):
    a = write(tmp_path / "a", runs=RUNS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"no table runs, curves, .* or test_losses .* in {tmp_path / 'empty'}"):
        merge([a, tmp_path / "empty"], tmp_path / "out")


def test_the_command_names_what_contradicts_and_leaves_what_was_there(tmp_path):
    a, out = write(tmp_path / "a", runs=RUNS), tmp_path / "out"
    merge([a], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    b = write(tmp_path / "b", runs=RUNS.assign(final_test_nll=1.0))
    command = [sys.executable, "-m", "lorabench.cli", "merge", str(a), str(b), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lorabench: runs: run_id ")
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
