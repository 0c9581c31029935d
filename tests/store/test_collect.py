"""Collected runs say what their preset and protocol say: the kinds of data and base, and how they were trained."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorabench.analysis.estimate import ExampleLosses
from lorabench.config.inputs import GgufModel, HubModel, TinyModel
from lorabench.config.loading import load_preset
from lorabench.data.sft import build_dataset, read_dataset
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.store import io
from lorabench.store.collect import base_kind, collect
from lorabench.store.io import read_table, write_curves_csv, write_table
from lorabench.store.layout import Layout
from lorabench.store.schemas import CURVES, JOB, RUNS

from ..handmade import make_run


def write_job(rows, path):
    write_table(pa.Table.from_pylist(rows, schema=JOB), path)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_runs_have_the_columns_in_which_sources_differ(tmp_path, schedule):
    plan = make_plan(load_preset("smoke"))
    job = next(job for job in plan.jobs if job.sweeps[0].condition.dataset == "instruct")
    protocol = json.dumps(plan.preset.protocol.model_dump() | {"schedule": schedule})
    rows = [dict.fromkeys(RUNS.names) | make_run(rank, 1e-3, protocol=protocol) for rank in (None, 8)]
    path = tmp_path / f"{job.job_id}.parquet"
    write_job([row | {"curve": [], "test_losses": [{"loss": 2.5, "tokens": 4}]} for row in rows], path)
    collect([path], tmp_path / "tables", plan)
    runs = read_table(tmp_path / "tables", "runs").set_index("method")
    names = ["data_kind", "base_kind", "precision", "schedule", "alpha_convention", "unembedding"]
    assert runs.loc["lora", names].tolist() == ["instruct", "base", "fp32", schedule, "alpha/r", True]
    assert runs.loc["fullft", names[:5]].tolist() == ["instruct", "base", "fp32", schedule, None]
    assert read_table(tmp_path / "tables", "test_losses")["loss"].tolist() == [2.5, 2.5]


def test_test_losses_have_the_groups_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.yaml").write_text("extends: [overnight, rl_smollm2]\n")
    layout = Layout.of("both.yaml")
    plan = make_plan(layout.preset)
    paths = []
    for dataset, n in {"docstrings": 192, "sums": 400}.items():
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
    assert table.loc["docstrings", "loss"].tolist() == list(range(192))
    assert ExampleLosses.of(table.reset_index()).influences(["docstrings"]).shape == (1, len(set(packages)))
    assert len(set(packages)) >= 28
    assert ExampleLosses.of(table.reset_index()).influences(["sums"]).shape == (1, 400)


def test_a_models_name_says_whether_it_is_a_base():
    sizes = {"parameters": 1, "hidden_size": 1}
    kinds = {"meta-llama/Llama-3.2-1B-Instruct": "instruct", "Qwen/Qwen3-8B-Base": "base", "Qwen/Qwen3-8B": None}
    for name, kind in kinds.items():
        assert base_kind(HubModel(kind="hub", id=name, **sizes)) == kind
    assert base_kind(HubModel(kind="hub", id="a/Llama-3.1-8B", chat_template="plain", **sizes)) == "base"
    assert base_kind(TinyModel(kind="tiny")) == "base"
    file = {"path": "SmolLM2-135M-Instruct.gguf", "wheel": "w==1", "sha256": "0" * 64}
    assert base_kind(GgufModel(kind="gguf", **file, **sizes)) == "instruct"


def make_curves(points: int) -> pa.Table:
    """Return curves with numbers of all sizes, some of them missing or infinite."""
    steps = np.arange(points)
    values = np.random.default_rng(0).normal(size=points) * 10.0 ** (steps % 41 - 20)
    for number, value in enumerate((None, np.inf, 1.0)):
        values[number : number + 1] = value
    columns = {"run_id": steps // 500, "step": steps, "examples": 4 * steps, "tokens": 10**9 * steps, "value": values}
    names = {"split": ["train"] * points, "metric": ["nll"] * points}
    return pa.table(columns | names).select(CURVES.names).cast(CURVES)


def test_curves_are_written_as_csv_part_by_part_as_if_at_once(tmp_path):
    for points in (0, 100, 140_000):
        curves = make_curves(points)
        write_table(curves, tmp_path / "curves.parquet")
        write_curves_csv(tmp_path)
        assert (tmp_path / "curves.csv").read_text() == curves.to_pandas().to_csv(index=False)


def test_curves_that_are_too_large_for_csv_are_parquet_only(tmp_path, monkeypatch, caplog):
    write_table(make_curves(100), tmp_path / "curves.parquet")
    write_curves_csv(tmp_path)
    size = (tmp_path / "curves.csv").stat().st_size
    monkeypatch.setattr(io, "MAX_CSV_BYTES", size)
    write_curves_csv(tmp_path)
    assert (tmp_path / "curves.csv").stat().st_size == size
    assert not caplog.text
    monkeypatch.setattr(io, "MAX_CSV_BYTES", size - 1)
    write_curves_csv(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.parquet"]
    assert f"the curves are in {tmp_path / 'curves.parquet'}" in caplog.text


MEMORY = 500_000_000
LIMITED = """
import resource, sys
from pathlib import Path
from lorabench.store.collect import collect
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
collect([Path(path) for path in sys.argv[3:]], Path(sys.argv[2]))
"""


def write_jobs(folder, points, runs, jobs, test_examples=100):
    """Write the files of jobs with runs that have `points` points of curves together, and return their paths."""
    generator = np.random.default_rng(0)
    own, per_run = runs // jobs, points // runs
    steps = np.tile(np.arange(per_run), own)
    split = pa.array(np.where(steps % 10 == 0, "validation", "train"))
    paths = []
    for job in range(jobs):
        values = generator.uniform(1, 9, len(steps))
        entries = {"step": steps, "examples": steps * 32, "tokens": steps * 32_768, "split": split}
        entries |= {"metric": pa.array(["nll"] * len(steps)), "value": values}
        losses = {"loss": np.zeros(own * test_examples, np.float32), "tokens": np.ones(own * test_examples, np.int32)}
        columns = {name: pa.nulls(own, JOB.field(name).type) for name in JOB.names}
        columns["run_id"] = pa.array([f"{job:06d}{run:06d}" for run in range(own)])
        columns |= {name: pa.array([name] * own) for name in ("model", "dataset", "method")}
        for name, each, nested in (("curve", per_run, entries), ("test_losses", test_examples, losses)):
            kind = JOB.field(name).type
            structs = pa.table(nested, schema=pa.schema(list(kind.value_type))).to_struct_array().combine_chunks()
            offsets = pa.array(np.arange(own + 1) * each, pa.int32())
            columns[name] = pa.ListArray.from_arrays(offsets, structs, type=kind)
        paths.append(folder / f"{job}.parquet")
        write_table(pa.table(columns, schema=JOB), paths[-1])
    return paths


@pytest.mark.slow
def test_a_million_points_are_collected_in_little_memory(tmp_path):
    jobs = write_jobs(tmp_path, points=1_000_000, runs=1_000, jobs=20)
    command = [sys.executable, "-c", LIMITED, str(MEMORY), str(tmp_path / "tables"), *map(str, jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    nested = pa.concat_tables([pq.read_table(path, columns=["curve"]) for path in jobs])["curve"]
    curves = pq.read_table(tmp_path / "tables/curves.parquet")
    values = [point["value"] for run in nested.slice(0, 3).to_pylist() for point in run]
    assert len(curves) == 1_000_000
    assert curves["value"].slice(0, len(values)).to_pylist() == values
    assert len(set(curves["run_id"].to_pylist())) == 1_000
