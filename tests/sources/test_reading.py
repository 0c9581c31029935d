"""A source is read by its mapping into tidy tables, and what the mapping does not explain is refused in a sentence."""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from contextlib import closing

import pandas as pd
import pytest

from lorabench.errors import UserError
from lorabench.sources.reading import import_source, write_tables
from lorabench.store.tables import Tables

from .conftest import COLUMNS, ROWS


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def columns(**changed):
    kept = {
        "run_id": "name",
        "method": {"from": "kind", "values": {"full": "fullft", "adapter": "lora"}},
        "rank": "r",
        "lr": "LR",
        "seed": "seed",
        "final_test_nll": {"from": "loss", "unit": "nats"},
    } | changed
    return {"columns": {name: column for name, column in kept.items() if column is not None}}


def test_a_table_becomes_the_tidy_tables(source, tmp_path):
    folder = source(runs=columns(final_test_nll={"from": "loss", "unit": "bits"}))
    write_tables(import_source(folder), tmp_path / "tables")
    runs = Tables.read(tmp_path / "tables").runs
    assert runs["method"].tolist() == ["fullft"] * 3 + ["lora"] * 3
    assert runs["rank"].isna().tolist() == [True] * 3 + [False] * 3
    assert runs["final_test_nll"].iloc[0] == pytest.approx(2.1 * math.log(2))
    assert set(runs["base_params"]) == {1_000_000_000}
    assert set(runs["alpha_convention"]) == {"alpha 32"}


REWARD = {"final_test_nll": None, "final_reward": {"from": "loss", "unit": "share"}}
REWARD["final_valid_reward"] = REWARD["final_reward"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [*ROWS, ROWS[0].replace("full-", "again-", 1)]}, "has several runs with model m.* seed 0; name"),
        ({"runs": columns(final_test_nll="loss")}, "runs.columns: final_test_nll has no unit; allowed: nats, bits"),
        (
            {"runs": columns(final_test_nll={"from": "loss", "unit": "bans"})},
            "final_test_nll has unit = 'bans'; allowed: nats, bits",
        ),
        ({"runs": columns(rank={"from": "r", "unit": "nats"})}, "rank has unit = 'nats', but this column has no unit"),
        ({"runs": columns(**REWARD)}, "column 'loss' has 2.2, but a share is at most 1"),
        (
            {"runs": columns(**REWARD | {"final_reward": {"from": "seed", "unit": "percent"}}),
             "rows": [row.replace(",0,", ",1,").replace(",2.", ",0.") for row in ROWS]},
            "column 'seed' has no percentage above 1; a share has `unit: share`",
        ),
        ({"runs": {"sha256": "00"}}, "runs.csv has changed: its SHA-256 is .* says 00"),
        ({"runs": {"file": "other.csv"}}, "other.csv: there is no such file"),
        ({"runs": columns(lr="learning_rate")}, f"has no column 'learning_rate'; it has {COLUMNS.replace(',', ', ')}"),
        ({"runs": columns(gap="loss")}, "runs.columns: no columns of the tidy table `runs`: 'gap'"),
        ({"runs": columns(method={"from": "kind", "values": {"full": "fullft"}})}, "'adapter', which .*does not list"),
        ({"models": {"n": {"scale": "1B", "parameters": 1}}}, "model 'm' is not described under `models`"),
        ({"rows": [*ROWS[:-1], ROWS[-1].replace("2.2", "low")]}, "column 'loss' has 'low', which is not a number"),
        ({"doubts": []}, "doubts = "),
        ({"about": None}, "about = None: input should be a valid string"),
        ({"noise": {"sd": 0.1}}, "noise: state sd, dof and source, or the name of another source as `from`"),
        ({"wall": 3}, "wall: unknown key"),
        (
            {"attributes": {"schedule": "constant", "alpha": 32}, "about": 1,
             "runs": columns(lr={"from": "LR", "unit": "nats"}, final_test_nll="loss")},
            r"missing: attributes\.precision \(in words, .* or mixed, or unknown\), attributes\.base_kind \(base, "
            r"instruct, mixed or unknown\); about = 1: .*; attributes\.alpha = 32; allowed: .*; runs\.columns: "
            "final_test_nll has no unit; .*; lr has unit = 'nats'",
        ),
        (
            {"attributes": {"precision": "bf16", "schedule": "constant", "alpha": "32", "base_kind": "chat"}},
            r"attributes\.base_kind = 'chat'; allowed: base, instruct, mixed or unknown",
        ),
        ({"runs": columns(lr="learning_rate", seed="s")}, "has no column 'learning_rate', 's'; it has "),
        ({"runs": columns(method={"from": "kind", "values": {}})}, "'adapter', 'full', which .*does not list"),
        ({"runs": columns() | {"constants": {"task": "sft"}}}, "runs: neither columns nor constants say which model"),
    ],
)  # fmt: skip
def test_what_is_not_explained_is_refused_in_a_sentence(source, changes, message):
    with pytest.raises(UserError, match=message) as refused:
        import_source(source(**changes))
    assert len(str(refused.value).splitlines()) == 1


def test_a_folder_without_a_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no source, since it has no file source.yaml"):
        import_source(tmp_path)


def test_a_run_that_is_listed_twice_counts_once_and_repeats_give_their_mean(source):
    listed = [*ROWS, ROWS[0]]
    assert len(import_source(source(rows=listed, runs={"one_run": ["name"]})).tables.runs) == 6
    contradicting = [*ROWS, ROWS[0].replace("2.1", "2.5")]
    with pytest.raises(UserError, match="run full-1e-05-0 is listed with several values of loss"):
        import_source(source(rows=contradicting, runs={"one_run": ["name"]}))
    repeated = [*ROWS, ROWS[0].replace("full-", "again-", 1).replace("2.1", "2.5")]
    runs = import_source(source(rows=repeated, runs={"repeats": "mean"})).tables.runs
    assert len(runs) == 6
    assert runs["final_test_nll"].iloc[0] == pytest.approx(2.3)
    assert set(runs["seed"]) == {0}


def test_rows_are_left_out_by_a_value(source):
    rule = {"column": "kind", "values": ["adapter"], "reason": "another method"}
    assert set(import_source(source(runs={"leave_out": [rule]})).tables.runs["method"]) == {"fullft"}


def test_the_loss_of_the_base_is_the_point_at_step_0(source):
    rows = [f"{row},3.5" for row in ROWS]
    mapping = columns(base_nll={"from": "base", "unit": "nats"})
    curves = import_source(source(rows, f"{COLUMNS},base", runs=mapping)).tables.curves
    points = curves[["step", "split", "metric", "value"]].drop_duplicates()
    assert points.values.tolist() == [[0, "validation", "nll", 3.5]]


def test_a_constant_learning_rate_makes_long_runs_short_ones(source):
    folder = source()
    names = [row.partition(",")[0] for row in ROWS]
    steps = [(name, step) for name in names for step in range(1, 51 if name == "full-1e-05-0" else 101)]
    lines = [f"{name},{step},{step / 100}" for name, step in steps]
    (folder / "curves.csv").write_text("\n".join(["run_id,step,train", *lines]) + "\n")
    curves = {
        "file": "curves.csv",
        "format": "csv",
        "sha256": sha256(folder / "curves.csv"),
        "columns": {"run_id": "run_id", "step": "step"},
        "metrics": [{"column": "train", "split": "train", "metric": "nll"}],
        "shorter": {"models": ["m"], "steps": 50, "window": 10, "least": 50},
    }
    runs = import_source(source(curves=curves)).tables.runs
    assert runs.groupby("steps").size().to_dict() == {50: 6, 100: 6}
    short = runs[runs["steps"] == 50]
    assert short["final_train_nll"].unique() == pytest.approx([sum(range(41, 51)) / 1000])


def test_json_lines_and_the_result_json_of_peft_are_read(source):
    folder = source()
    lines = [json.dumps({"cfg": {"name": row.split(",")[0], "LR": float(row.split(",")[3])}}) for row in ROWS]
    (folder / "runs.jsonl").write_text("\n".join(lines))
    mapping = {"run_id": "cfg.name", "lr": "cfg.LR"}
    constants = {"task": "sft", "model": "m", "dataset": "d", "method": "fullft", "status": "done"}
    runs = {"file": "runs.jsonl", "format": "jsonl", "sha256": sha256(folder / "runs.jsonl"), "columns": mapping}
    read = import_source(source(runs=runs | {"constants": constants})).tables.runs
    assert read["lr"].tolist() == [1e-5, 2e-5, 4e-5, 1e-4, 2e-4, 4e-4]
    result = {
        "run_info": {"experiment_name": "x", "train_config": {"model_id": "m", "optimizer_kwargs": {"lr": 1e-4}}},
        "train_info": {"status": "success", "metrics": [{"train loss": 2.0}, {"train loss": 1.0}]},
    }
    (folder / "x.json").write_text(json.dumps(result))
    mapping = {
        "model": "run_info.train_config.model_id",
        "lr": "run_info.train_config.optimizer_kwargs.lr",
        "status": {"from": "train_info.status", "values": {"success": "done"}},
        "final_train_nll": {"from": "train_info.metrics.last.train loss", "unit": "nats"},
    }
    runs = {"file": "*.json", "format": "peft", "sha256": sha256(folder / "x.json"), "columns": mapping}
    constants = {"task": "sft", "dataset": "d", "method": "fullft"}
    read = import_source(source(runs=runs | {"constants": constants})).tables.runs
    assert (read["final_train_nll"].item(), read["lr"].item(), read["run_id"].item()) == (1.0, 1e-4, "made-up-0")
    (folder / "x.json").write_text("[]")
    runs["sha256"] = sha256(folder / "x.json")
    with pytest.raises(UserError, match="can't be read as peft"):
        import_source(source(runs=runs | {"constants": constants}))


def test_an_export_of_wandb_is_read(source):
    folder = source()
    rows = [(row.split(",")[0], json.dumps({"lr": float(row.split(",")[3])})) for row in ROWS]
    with closing(sqlite3.connect(folder / "runs.db")) as database:
        pd.DataFrame(rows, columns=["id", "config"]).to_sql("runs", database)
    mapping = {"run_id": "id", "lr": "config.lr"}
    constants = {"task": "sft", "model": "m", "dataset": "d", "method": "fullft", "status": "done"}
    runs = {"file": "runs.db", "format": "wandb", "sha256": sha256(folder / "runs.db"), "columns": mapping}
    runs |= {"constants": constants}
    read = import_source(source(runs=runs | {"table": "runs"})).tables.runs
    assert read["lr"].tolist() == [1e-5, 2e-5, 4e-5, 1e-4, 2e-4, 4e-4]
    with pytest.raises(UserError, match="can't be read as wandb: no table 'jobs'; it has runs"):
        import_source(source(runs=runs | {"table": "jobs"}))
