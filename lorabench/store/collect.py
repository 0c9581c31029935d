"""Make tidy tables from the records of runs, jobs and evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lorabench.config.inputs import HubModel, ModelSpec, TinyModel
from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Sweep
from lorabench.store.io import write_csv, write_frame, write_table
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, EVALS, JOB, RUNS, TEST_LOSSES, WHERE_ABSENT, CurvePoint, ExampleLoss
from lorabench.utils.files import read_parquet


def run_row(record: dict[str, Any], experiments: Iterable[str]) -> dict[str, Any]:
    """Return a run's row of the `runs` table.

    Args:
        record: the content of the run's record.json.
        experiments: the experiments that the run belongs to.
    """
    spec, outcome, environment = record["spec"], record["outcome"], record["environment"]
    flat = {**environment, **outcome, **spec, "run_id": record["run_id"], "experiments": list(experiments)}
    flat["versions"] = json.dumps(environment["packages"], sort_keys=True)
    flat["protocol"] = json.dumps(spec["protocol"], sort_keys=True)
    flat["model_sha256"] = json.dumps(environment["model_sha256"], sort_keys=True)
    return {name: flat.get(name) for name in RUNS.names}


def write_curves(run_id: str, points: list[CurvePoint], path: Path) -> None:
    """Write the curves of one run in the columns of CURVES."""
    rows = [{"run_id": run_id, **vars(point)} for point in points]
    write_table(pa.Table.from_pylist(rows, schema=CURVES), path)


def write_test_losses(run_id: str, losses: Sequence[ExampleLoss], path: Path) -> None:
    """Write the test losses of one run in the columns of TEST_LOSSES; examples are numbered in the order given."""
    rows = [{"run_id": run_id, "example": number, **vars(loss)} for number, loss in enumerate(losses)]
    write_table(pa.Table.from_pylist(rows, schema=TEST_LOSSES), path)


def sweep_rows(folders: Iterable[RunFolder], sweep: Sweep) -> list[dict[str, Any]]:
    """Return the rows of a sweep's finished runs for `write_job`, each with its curves nested."""
    # The preset may have given the model or dataset another name since the run was trained.
    names = {"model": sweep.condition.model, "dataset": sweep.condition.dataset}
    rows = []
    for folder in folders:
        curve = folder.read_curves().drop_columns(["run_id"]).to_pylist()
        losses = folder.read_test_losses()
        nested = {"curve": curve, "test_losses": losses and losses.drop_columns(["run_id", "example"]).to_pylist()}
        rows.append({**run_row(folder.read_record(), sweep.experiments), **names, **nested})
    return rows


def write_job(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the file of a job: the `sweep_rows` of all its sweeps."""
    write_table(pa.Table.from_pylist(rows, schema=JOB), path)


def collect(jobs: list[Path], out: Path, plan: Plan | None = None) -> None:
    """Merge files of jobs into the tables `runs`, `curves` (both parquet and CSV) and `test_losses` (parquet).

    Args:
        jobs: the files that `write_job` wrote.
        out: the folder of the tables.
        plan: the plan to take the runs' experiments and kinds of data and base from; without it, those are kept that
            the files were written with.

    Raises:
        UserError: a file is damaged, or its job is not in the plan.
    """
    table = pa.concat_tables([_read_job(path, plan) for path in jobs])
    runs = table.drop_columns(["curve", "test_losses"]).sort_by([("model", "ascending"), ("dataset", "ascending")])
    curves = pa.Table.from_pylist(
        [
            {"run_id": row["run_id"], **point}
            for row in table.select(["run_id", "curve"]).to_pylist()
            for point in row["curve"]
        ],
        schema=CURVES,
    )
    for name, part in (("runs", runs), ("curves", curves)):
        write_table(part, out / f"{name}.parquet")
        write_csv(part.to_pandas(), out / f"{name}.csv")
    losses = pa.Table.from_pylist(
        [
            {"run_id": row["run_id"], "example": number, **loss}
            for row in table.select(["run_id", "test_losses"]).to_pylist()
            for number, loss in enumerate(row["test_losses"] or [])
        ],
        schema=TEST_LOSSES,
    )
    write_table(losses, out / "test_losses.parquet")


def _read_job(path: Path, plan: Plan | None) -> pa.Table:
    """Read the runs of a job, and fill the columns that runs don't record.

    In some of them other projects' runs may differ, while all runs of this project share the value. Others are kinds
    of things that the preset names.
    """
    table = read_parquet(path, JOB)
    lora = [method == "lora" for method in table.column("method").to_pylist()]
    unembedding = [json.loads(text or "{}").get("include_unembedding") for text in table.column("protocol").to_pylist()]
    columns: dict[str, list[Any]] = {
        "alpha_convention": ["alpha/r" if is_lora else None for is_lora in lora],
        "unembedding": [value if is_lora else None for value, is_lora in zip(unembedding, lora, strict=True)],
        "precision": ["fp32"] * len(table),
        "schedule": ["constant"] * len(table),
    }
    if plan is not None:
        sources, models = plan.preset.sources, plan.preset.models
        columns["experiments"] = [plan.job(path.stem).experiments] * len(table)
        columns["data_kind"] = [sources[name].kind for name in table.column("dataset").to_pylist()]
        columns["base_kind"] = [base_kind(models[name]) for name in table.column("model").to_pylist()]
    for name, values in columns.items():
        field = RUNS.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    return table


def base_kind(spec: ModelSpec) -> str | None:
    """Return whether a model is a `base` or was instruction-tuned (`instruct`), by its name; None if it does not say.

    A preset gives a model without a chat template of its own the template `plain`, or a file's; it is a base too.
    """
    if isinstance(spec, TinyModel) or spec.chat_template is not None:
        return "base"
    name = (spec.id if isinstance(spec, HubModel) else Path(spec.path).name).lower()
    if "instruct" in name:
        return "instruct"
    return "base" if "base" in name else None


def collect_evals(files: list[Path], out: Path) -> None:
    """Merge the scores of evaluations into the table `evals` (parquet and CSV) in the folder `out`.

    Rows are ordered by model, the base model before its fine-tuned runs.

    Raises:
        UserError: a file is damaged, or was not written by `lorabench step evaluate`.
    """
    order = ["model", "dataset", "batch_size", "steps", "method", "rank", "placement", "lr", "seed", "run_id"]
    tables = []
    for path in files:
        table = read_parquet(path)
        for name, value in WHERE_ABSENT["evals"].items():
            if name not in table.column_names:
                table = table.append_column(name, pa.array([value] * len(table), EVALS.field(name).type))
        if missing := [name for name in EVALS.names if name not in table.column_names]:
            raise UserError(f"{path} is no evaluation: it has no column {', '.join(missing)}")
        tables.append(table.select(EVALS.names).cast(EVALS))
    # The stable sort keeps the rows of one model in the order of its tasks.
    frame = pa.concat_tables(tables).to_pandas()
    write_frame(frame.sort_values(order, na_position="first", kind="stable"), "evals", out)
