"""Collected runs say what their preset and protocol say: the kinds of data and base, and how they were trained."""

import json

import pyarrow as pa
import pytest

from lorabench.config.loading import load_preset
from lorabench.data.sft import build_dataset, read_dataset
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store.collect import collect
from lorabench.store.io import read_table, write_table
from lorabench.store.layout import Layout
from lorabench.store.schemas import JOB, RUNS

from ..handmade import make_run


def write_job(rows, path):
    write_table(pa.Table.from_pylist(rows, schema=JOB), path)


def test_runs_have_the_columns_in_which_sources_differ(tmp_path):
    plan = make_plan(load_preset("smoke"))
    job = next(job for job in plan.jobs if job.sweeps[0].condition.dataset == "instruct")
    protocol = json.dumps(plan.preset.protocol.model_dump() | {"schedule": "linear"})
    rows = [dict.fromkeys(RUNS.names) | make_run(rank, 1e-3, protocol=protocol) for rank in (None, 8)]
    path = tmp_path / f"{job.job_id}.parquet"
    point = {"step": 1, "examples": 4, "tokens": 10, "split": "train", "metric": "nll", "value": None}
    write_job([row | {"curve": [point], "test_losses": [{"loss": 2.5, "tokens": 4}]} for row in rows], path)
    collect([path], tmp_path / "tables", plan, Layout.of("smoke"))
    runs = read_table(tmp_path / "tables", "runs").set_index("method")
    names = ["data_kind", "base_kind", "precision", "schedule", "alpha_convention", "unembedding"]
    assert runs.loc["lora", names].tolist() == ["instruct", "base", "fp32", "linear", "alpha/r", True]
    assert runs.loc["fullft", names[:5]].tolist() == ["instruct", "base", "fp32", "linear", None]
    assert read_table(tmp_path / "tables", "test_losses")["loss"].tolist() == [2.5, 2.5]
    lines = [f"{row['run_id']},1,4,10,train,nll," for row in rows]
    assert (tmp_path / "tables/curves.csv").read_text().splitlines()[1:] == lines


def test_test_losses_have_the_groups_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.yaml").write_text("extends: [overnight, rl_smollm2]\n")
    layout = Layout.of("both.yaml")
    plan = make_plan(layout.preset)
    paths = []
    for dataset, n in {"docstrings": 720, "sums": 400}.items():
        job = next(job for job in plan.jobs if job.sweeps[0].condition.dataset == dataset)
        condition = job.sweeps[0].condition
        run = make_run(None, 1e-3, model=condition.model, dataset=dataset)
        losses = [{"loss": float(number), "tokens": 4} for number in range(n)]
        paths.append(tmp_path / f"{job.job_id}.parquet")
        # A run from before test losses were kept has none.
        both = {"test_losses": losses, "run_id": dataset}, {"test_losses": None, "run_id": f"older {dataset}"}
        write_job([dict.fromkeys(RUNS.names) | run | {"curve": []} | own for own in both], paths[-1])
    with pytest.raises(UserError, match="docstrings.*parquet is missing"):
        collect(paths, tmp_path / "tables", plan, layout)
    build_dataset(layout.preset.datasets["docstrings"], layout.dataset("docstrings"))
    collect(paths, tmp_path / "tables", plan, layout)
    table = read_table(tmp_path / "tables", "test_losses").set_index("run_id")
    assert table.loc["sums", "group"].isna().all()
    packages = [row["source"] for row in read_dataset(layout.dataset("docstrings")) if row["split"] == "test"]
    assert table.loc["docstrings", "group"].tolist() == packages
    assert table.loc["docstrings", "loss"].tolist() == list(range(720))
