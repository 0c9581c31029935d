"""Make tidy tables from the records of runs, jobs and evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lorabench.config.inputs import HubDataset, HubModel, ModelSpec, TinyModel
from lorabench.config.preset import Preset
from lorabench.data.identity import has_groups, id_of_test
from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Sweep
from lorabench.store.io import write_csv, write_frame, write_table
from lorabench.store.layout import Layout
from lorabench.store.made_from import of_files, of_runs
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, EVALS, JOB, RUN_TEST_LOSSES, RUNS, TEST_LOSSES, CurvePoint, ExampleLoss
from lorabench.utils.files import read_parquet


def run_row(record: dict[str, Any], experiments: Iterable[str]) -> dict[str, Any]:
    """Return the row of `runs` for the content of a run's record.json and the experiments that the run belongs to."""
    spec, outcome, environment = record["spec"], record["outcome"], record["environment"]
    flat = {**environment, **outcome, **spec, "run_id": record["run_id"], "experiments": list(experiments)}
    flat["versions"] = json.dumps(environment["packages"], sort_keys=True)
    flat["protocol"] = json.dumps(spec["protocol"], sort_keys=True)
    flat["model_sha256"] = json.dumps(environment["model_sha256"], sort_keys=True)
    return {name: flat.get(name) for name in RUNS.names}


def write_entries(
    run_id: str, entries: Sequence[CurvePoint] | Sequence[ExampleLoss], schema: pa.Schema, path: Path
) -> None:
    """Write one run's rows of CURVES or RUN_TEST_LOSSES, and number them in the order given."""
    rows = [vars(entry) | {"run_id": run_id, "example": number} for number, entry in enumerate(entries)]
    write_table(pa.Table.from_pylist(rows, schema=schema), path)


def sweep_table(folders: Sequence[RunFolder], sweep: Sweep) -> pa.Table:
    """Return the finished runs of a sweep as rows of JOB, the table of a job."""
    # The preset may have given the model or dataset another name since the run was trained.
    names = {"model": sweep.condition.model, "dataset": sweep.condition.dataset}
    rows = [{**run_row(folder.read_record(), sweep.experiments), **names} for folder in folders]
    nested = pa.concat_tables([folder.read_nested() for folder in folders])
    return pa.table([*pa.Table.from_pylist(rows, schema=RUNS).columns, *nested.columns], schema=JOB)


def collect(jobs: list[Path], out: Path, plan: Plan, layout: Layout) -> None:
    """Merge files of jobs into the tables `runs`, `curves` (both parquet and CSV) and `test_losses` (parquet).

    The runs' experiments and kinds of data and base are those of the plan, and the groups of test examples those of the
    layout's data. UserError says that a file is damaged or missing, or that its job is not in the plan.
    """

    def runs_of(path: Path) -> pa.Table:
        table = read_parquet(path, RUNS)
        column = RUNS.field("experiments")
        experiments = pa.array([plan.job(path.stem).experiments] * len(table), column.type)
        table = table.set_column(RUNS.get_field_index("experiments"), column, experiments)
        return with_unrecorded(table, plan.preset)

    runs = pa.concat_tables(map(runs_of, jobs)).sort_by([("model", "ascending"), ("dataset", "ascending")])
    curves, losses = (
        pa.schema([JOB.field(name) for name in ("run_id", "model", "dataset", column)])
        for column in ("curve", "test_losses")
    )

    def losses_of(path: Path) -> pa.Table:
        table = read_parquet(path, losses)
        rows = entries(table, "test_losses", RUN_TEST_LOSSES)
        # The runs of a job have the same model and dataset.
        model, dataset = (table[name][0].as_py() if len(table) else None for name in ("model", "dataset"))
        test_data = id_of_test(layout.preset.sources[dataset], layout.preset.first_seed) if dataset else None
        rows = rows.append_column("test_data", pa.repeat(pa.scalar(test_data, pa.string()), len(rows)))
        groups = test_groups(layout, model, dataset) if model and dataset else None
        if groups is None:
            return rows.append_column("group", pa.nulls(len(rows), pa.string()))
        for count in set(pc.list_value_length(table["test_losses"]).to_pylist()) - {None, 0, len(groups)}:
            raise UserError(f"{count} test losses of a run on {dataset}, which has {len(groups)} test examples")
        return rows.append_column("group", groups.take(rows["example"]))

    made_from = of_runs(layout.runs, runs["run_id"].to_pylist())
    write_table(runs, out / "runs.parquet", made_from)
    write_csv(runs.to_pandas(), out / "runs.csv")
    points = pa.concat_tables(entries(read_parquet(path, curves), "curve", CURVES) for path in jobs)
    write_table(points, out / "curves.parquet", made_from)
    write_csv(points.to_pandas(), out / "curves.csv")
    test_losses = pa.concat_tables(losses_of(path).select(TEST_LOSSES.names) for path in jobs).cast(TEST_LOSSES)
    write_table(test_losses, out / "test_losses.parquet", made_from)


def entries(table: pa.Table, column: str, schema: pa.Schema) -> pa.Table:
    """Return the entries that a column of lists holds as rows, each with the run_id and its number in the list."""
    lists = table[column].combine_chunks()
    rows = pc.list_parent_indices(lists)
    flat = pa.Table.from_struct_array(pc.list_flatten(lists)).append_column("run_id", table["run_id"].take(rows))
    numbers = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return flat.append_column("example", pa.array(numbers)).select(schema.names).cast(schema)


def test_groups(layout: Layout, model: str, dataset: str) -> pa.Array | None:
    """Return the group of each test example in the order of a run's losses; None where examples are independent."""
    spec = layout.preset.sources[dataset]
    if not has_groups(spec):
        return None
    limited = isinstance(spec, HubDataset) and spec.max_tokens is not None
    tokens = layout.tokens(model, dataset) if limited else None
    # Every start of the workflow imports this module, so it must be fast.
    from lorabench.data.tokens import groups_of_tests

    return pa.array(groups_of_tests(layout.dataset(dataset), tokens), pa.string())


def with_unrecorded(table: pa.Table, preset: Preset) -> pa.Table:
    """Return the table `runs` with the columns filled that runs don't record.

    In some of them other projects' runs may differ, while all runs of this project share the value. Others are kinds
    of things that the preset names; the preset that runs were saved from may have named other data and models since.
    """
    lora, rows = pc.not_equal(table["method"], "fullft"), len(table)
    protocols = [json.loads(text or "{}") for text in table["protocol"].to_pylist()]
    unembedding = [protocol.get("include_unembedding") for protocol in protocols]
    columns: dict[str, Any] = {
        "alpha_convention": pc.if_else(lora, "alpha/r", None),
        "unembedding": pc.if_else(lora, pa.array(unembedding, pa.bool_()), None),
        "precision": pa.repeat("fp32", rows),
        "schedule": pa.array([protocol.get("schedule", "constant") for protocol in protocols], pa.string()),
    }
    kinds = {name: source.kind for name, source in preset.sources.items()}
    test_data = {name: id_of_test(source, preset.first_seed) for name, source in preset.sources.items()}
    base_kinds = {name: base_kind(model) for name, model in preset.models.items()}
    columns["data_kind"] = pa.array(map(kinds.get, table["dataset"].to_pylist()), pa.string())
    columns["test_data"] = pa.array(map(test_data.get, table["dataset"].to_pylist()), pa.string())
    columns["base_kind"] = pa.array(map(base_kinds.get, table["model"].to_pylist()), pa.string())
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table.cast(RUNS)


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
    """Merge the scores of evaluations into the table `evals` (parquet and CSV), a base before its fine-tuned runs.

    UserError says that a file is damaged.
    """
    order = ["model", "dataset", "batch_size", "steps", "method", "rank", "placement", "lr", "seed", "run_id"]
    scores = pd.concat([read_parquet(path, EVALS).to_pandas() for path in files])
    # The stable sort keeps the rows of one model in the order of its tasks.
    scores = scores.sort_values(order, na_position="first", kind="stable")
    write_frame(scores, "evals", out, made_from=of_files((path.stem, path) for path in files))
