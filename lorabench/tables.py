"""The tidy tables: their columns, and how they are made from records of runs, written and read.

    runs      one row per run
    curves    one row per run, step, split and metric
    compute   one row per model, method, rank and placement: FLOPs, time and memory of a training step
    counts    one row per architecture, placement and rank: numbers of parameters, counted without weights
    evals     one row per evaluated model, task, metric and filter: scores of lm-eval
    claims    one row per claim

The analysis, claims, figures and report read these tables and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.errors import UserError
from lorabench.plan import Plan, Sweep
from lorabench.records import RunFolder, atomic_path, read_parquet

if TYPE_CHECKING:
    # Imported in the functions that use it: a plan that reads a measured speed from a table would start later.
    import pandas as pd

    from lorabench.training.run import Point

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("experiments", pa.list_(pa.string())),
        ("model", pa.string()),
        ("dataset", pa.string()),
        ("task", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("placement", pa.string()),
        ("alpha", pa.float64()),
        ("init_a", pa.float64()),
        ("lr_ratio", pa.float64()),
        ("eps", pa.float64()),
        ("lr", pa.float64()),
        ("batch_size", pa.int64()),
        ("steps", pa.int64()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("diverged_at", pa.int64()),
        ("final_valid_nll", pa.float64()),
        ("final_test_nll", pa.float64()),
        ("test_scored_tokens", pa.int64()),
        ("first_epoch_nats", pa.float64()),
        ("first_epoch_scored_tokens", pa.int64()),
        ("entropy_bits", pa.float64()),
        ("group_size", pa.int64()),
        ("max_new_tokens", pa.int64()),
        ("base_reward", pa.float64()),
        ("final_valid_reward", pa.float64()),
        ("final_reward", pa.float64()),
        ("best_reward", pa.float64()),
        ("family", pa.string()),
        ("hidden_size", pa.int64()),
        ("trainable_params", pa.int64()),
        ("base_params", pa.int64()),
        ("train_tokens", pa.int64()),
        ("train_flops", pa.float64()),
        ("wall_s", pa.float64()),
        ("peak_mem_bytes", pa.int64()),
        ("device", pa.string()),
        ("threads", pa.int64()),
        ("host", pa.string()),
        ("started", pa.string()),
        ("git_sha", pa.string()),
        ("git_dirty_patch", pa.string()),
        ("versions", pa.string()),
        ("model_sha256", pa.string()),
        ("dataset_sha256", pa.string()),
        ("tokenizer_sha256", pa.string()),
        ("template_sha256", pa.string()),
        ("protocol", pa.string()),
    ]
)

_CURVE = [
    ("step", pa.int64()),
    ("examples", pa.int64()),
    ("tokens", pa.int64()),
    ("split", pa.string()),
    ("metric", pa.string()),
    ("value", pa.float64()),
]
CURVES = pa.schema([("run_id", pa.string()), *_CURVE])

COMPUTE = pa.schema(
    [
        ("model", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("placement", pa.string()),
        ("batch_size", pa.int64()),
        ("sequence_length", pa.int64()),
        ("effective_width", pa.float64()),
        ("linear_flops", pa.float64()),
        ("total_flops", pa.float64()),
        ("step_s", pa.float64()),
        ("peak_mem_bytes", pa.int64()),
        ("trainable_params", pa.int64()),
        ("base_params", pa.int64()),
        ("device", pa.string()),
        ("threads", pa.int64()),
    ]
)

COUNTS = pa.schema(
    [
        ("architecture", pa.string()),
        ("placement", pa.string()),
        ("part", pa.string()),
        ("rank", pa.int64()),
        ("include_unembedding", pa.bool_()),
        ("trainable_params", pa.int64()),
        ("base_params", pa.int64()),
    ]
)

EVALS = pa.schema(
    [
        ("run_id", pa.string()),
        ("model", pa.string()),
        ("dataset", pa.string()),
        ("method", pa.string()),
        ("rank", pa.int64()),
        ("placement", pa.string()),
        ("alpha", pa.float64()),
        ("init_a", pa.float64()),
        ("lr_ratio", pa.float64()),
        ("eps", pa.float64()),
        ("lr", pa.float64()),
        ("batch_size", pa.int64()),
        ("steps", pa.int64()),
        ("seed", pa.int64()),
        ("final_test_nll", pa.float64()),
        ("final_reward", pa.float64()),
        ("about", pa.string()),
        ("task", pa.string()),
        ("source", pa.string()),
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("higher_is_better", pa.bool_()),
        ("n_samples", pa.int64()),
        ("num_fewshot", pa.int64()),
        ("eval_batch_size", pa.int64()),
        ("task_version", pa.string()),
        ("task_config", pa.string()),
        ("template_sha256", pa.string()),
        ("versions", pa.string()),
    ]
)

CLAIMS = pa.schema(
    [
        ("claim_id", pa.string()),
        ("kind", pa.string()),
        ("statement", pa.string()),
        ("figure", pa.string()),
        ("criterion", pa.string()),
        ("estimate", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("unit", pa.string()),
        ("n_runs", pa.int64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
        ("paper_value", pa.string()),
        ("published", pa.string()),
        ("run_ids", pa.list_(pa.string())),
    ]
)

# The file of a job holds its runs with their curves nested, since a job has one output.
_JOB = pa.schema([*RUNS, ("curve", pa.list_(pa.struct(_CURVE)))])


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


def best_lr(records: list[dict[str, Any]]) -> float | None:
    """Return the LR with the lowest final validation NLL, in RL with the highest final validation reward.

    If several LRs are equally good, the lowest is returned; None if every run diverged.

    Args:
        records: records of runs that differ in their LR only.
    """
    scored = []
    for record in records:
        outcome = record["outcome"]
        nll, reward = outcome.get("final_valid_nll"), outcome.get("final_valid_reward")
        if nll is not None or reward is not None:
            scored.append((-reward if nll is None else nll, record["spec"]["lr"]))
    return min(scored)[1] if scored else None


def write_curves(run_id: str, points: list[Point], path: Path) -> None:
    """Write the curves of one run in the columns of CURVES."""
    rows = [{"run_id": run_id, **vars(point)} for point in points]
    write_table(pa.Table.from_pylist(rows, schema=CURVES), path)


def sweep_rows(folders: Iterable[RunFolder], sweep: Sweep) -> list[dict[str, Any]]:
    """Return the rows of a sweep's finished runs for `write_job`, each with its curves nested."""
    # The preset may have given the model or dataset another name since the run was trained.
    names = {"model": sweep.condition.model, "dataset": sweep.condition.dataset}
    rows = []
    for folder in folders:
        curve = folder.read_curves().drop_columns(["run_id"]).to_pylist()
        rows.append({**run_row(folder.read_record(), sweep.experiments), **names, "curve": curve})
    return rows


def write_job(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the file of a job: the `sweep_rows` of all its sweeps."""
    write_table(pa.Table.from_pylist(rows, schema=_JOB), path)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a parquet file, whole or not at all.

    Raises:
        NoSpaceError: the disk is full.
    """
    with atomic_path(path) as partial:
        pq.write_table(table, partial)


def collect(jobs: list[Path], out: Path, plan: Plan | None = None) -> None:
    """Merge files of jobs into the tables `runs` and `curves` (parquet and CSV) in the folder `out`.

    Args:
        jobs: the files that `write_job` wrote.
        out: the folder of the tables.
        plan: the plan to take the runs' experiments from; without it, those are kept that the files were written with.

    Raises:
        UserError: a file is damaged, or its job is not in the plan.
    """
    table = pa.concat_tables([_read_job(path, plan) for path in jobs])
    runs = table.drop_columns(["curve"]).sort_by([("model", "ascending"), ("dataset", "ascending")])
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


def _read_job(path: Path, plan: Plan | None) -> pa.Table:
    table = read_parquet(path, _JOB)
    if plan is None:
        return table
    experiments = pa.array([plan.job(path.stem).experiments] * len(table), pa.list_(pa.string()))
    return table.set_column(table.schema.get_field_index("experiments"), RUNS.field("experiments"), experiments)


def collect_evals(files: list[Path], out: Path) -> None:
    """Merge the scores of evaluations into the table `evals` (parquet and CSV) in the folder `out`.

    Rows are ordered by model, the base model before its fine-tuned runs.

    Raises:
        UserError: a file is damaged, or was not written by `lorabench evaluate`.
    """
    order = ["model", "dataset", "batch_size", "steps", "method", "rank", "placement", "lr", "seed", "run_id"]
    tables = []
    for path in files:
        table = read_parquet(path)
        if missing := [name for name in EVALS.names if name not in table.column_names]:
            raise UserError(f"{path} is no evaluation: it has no column {', '.join(missing)}")
        tables.append(table.select(EVALS.names).cast(EVALS))
    # The stable sort keeps the rows of one model in the order of its tasks.
    frame = pa.concat_tables(tables).to_pandas()
    write_frame(frame.sort_values(order, na_position="first", kind="stable"), "evals", out)


def write_plan(plan: Plan, path: Path) -> None:
    """Write the planned runs as parquet, one row per run."""
    write_table(pa.Table.from_pylist(plan.rows()), path)


def write_frame(frame: pd.DataFrame, name: str, out: Path) -> None:
    """Write the tidy table `name` (parquet and CSV) into the folder `out`, in its documented columns."""
    schema = SCHEMAS[name]
    frame = frame.reindex(columns=schema.names)
    write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), out / f"{name}.parquet")
    write_csv(frame, out / f"{name}.csv")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write CSV, whole or not at all; the words of a list are joined by spaces."""
    flat = frame.copy()
    for column in flat.columns:
        if flat[column].map(lambda value: hasattr(value, "__len__") and not isinstance(value, str)).any():
            flat[column] = flat[column].map(lambda value: " ".join(map(str, value)))
    with atomic_path(path) as partial:
        flat.to_csv(partial, index=False)


SCHEMAS = {"runs": RUNS, "curves": CURVES, "compute": COMPUTE, "counts": COUNTS, "evals": EVALS, "claims": CLAIMS}


def table_path(folder: Path, name: str) -> Path | None:
    """Return the parquet file of a tidy table, or else its CSV file; None if the folder has neither."""
    return next((path for kind in ("parquet", "csv") if (path := folder / f"{name}.{kind}").is_file()), None)


def read_table(folder: Path, name: str, optional: bool = False) -> pd.DataFrame:
    """Read a tidy table from a folder, parquet or else CSV, in the documented types.

    Documented columns may be missing, and other columns are kept. Integers are `Int64`, since they may be null; lists
    are lists of words.

    Args:
        folder: the folder of the table's file.
        name: the name of the table.
        optional: whether to return an empty table without columns if there is no file.

    Raises:
        UserError: there is no such file, it can't be read, or a column holds a value of another type.
    """
    path = table_path(folder, name)
    if path is None:
        if optional:
            return _no_table()
        raise UserError(f"no table {name}.parquet or {name}.csv in {folder}")
    try:
        frame = _read(path, SCHEMAS[name])
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} can't be read as a table: {reason}") from error
    for column in SCHEMAS[name]:
        if column.name in frame:
            frame[column.name] = _typed(frame[column.name], column.type, path)
    return frame


def read_rows(folder: Path, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read some columns of a tidy table as one dict per row, with None for a missing value.

    A parquet file with the documented types is read without pandas, whose import takes longer than the reading.

    Raises:
        UserError: see `read_table`.
    """
    path, fields = table_path(folder, name), [SCHEMAS[name].field(column) for column in columns]
    if path is not None and path.suffix == ".parquet":
        # `read_table` below says what is wrong with a file that can't be read.
        with suppress(pa.ArrowException, OSError), pq.ParquetFile(path) as file:
            if all(field in file.schema_arrow for field in fields):
                rows: list[dict[str, Any]] = file.read(list(columns)).to_pylist()
                return rows
    frame = read_table(folder, name).reindex(columns=list(columns)).astype(object)
    return [dict(zip(columns, row, strict=True)) for row in frame.where(frame.notna(), None).itertuples(index=False)]


def _read(path: Path, schema: pa.Schema) -> pd.DataFrame:
    import pandas as pd

    if path.suffix == ".parquet":
        # The metadata of pandas would turn a column into the index.
        frame: pd.DataFrame = pq.read_table(path).to_pandas(ignore_metadata=True)
        return frame
    # Text columns are not parsed: a run_id may consist of digits.
    text = {column.name: str for column in schema if pa.types.is_string(column.type)}
    return pd.read_csv(path, dtype=text)


def with_all_columns(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the table `name` with the documented columns that it lacks added, as nulls of their type."""
    import pandas as pd

    absent = [column for column in SCHEMAS[name] if column.name not in frame]
    nulls = pd.Series(None, index=frame.index, dtype=object)
    return frame.assign(**{column.name: _typed(nulls, column.type, Path(name)) for column in absent})


def _typed(column: pd.Series[Any], kind: pa.DataType, path: Path) -> pd.Series[Any]:
    """Convert a column to its documented type.

    Raises:
        UserError: a value is not of that type.
    """
    import pandas as pd

    present = column.notna()
    typed: pd.Series[Any]
    if pa.types.is_string(kind):
        return column.map(str, na_action="ignore").astype(object).where(present, None)
    if pa.types.is_list(kind):
        what, valid = "list of words", column.map(lambda value: isinstance(value, str | Sequence | np.ndarray))
        typed = column.where(valid).map(words)
    elif pa.types.is_boolean(kind):
        truth = column.map(lambda value: {"true": True, "false": False}.get(str(value).lower()))
        what, valid, typed = "truth value", truth.notna(), truth.astype("boolean")
    else:
        numbers = pd.to_numeric(column.where(column.map(pd.api.types.is_scalar)), errors="coerce")
        what, valid, typed = "number", numbers.notna(), numbers.astype("float64")
        if pa.types.is_int64(kind):
            what, valid = "whole number", numbers.mod(1).eq(0) & numbers.abs().lt(2**63)
            typed = numbers.where(valid).astype("Int64")
    if len(wrong := column[present & ~valid]):
        raise UserError(f"{path}: column {column.name} has {wrong.tolist()[0]!r}, which is not a {what}")
    return typed


def _no_table() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame()


@dataclass(frozen=True)
class Tables:
    """The tidy tables that claims and figures are made from; a missing table is empty and has no columns."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    compute: pd.DataFrame = field(default_factory=_no_table)
    counts: pd.DataFrame = field(default_factory=_no_table)
    evals: pd.DataFrame = field(default_factory=_no_table)

    @classmethod
    def read(cls, *folders: Path) -> Tables:
        """Read the tables of one folder, or of several and merge them as `lorabench merge` does.

        Raises:
            UserError: a folder holds none of the tables; see also `read_table` and `merge_tables`.
        """
        names = ("runs", "curves", "compute", "counts", "evals")
        for folder in folders:
            if not any(table_path(folder, name) for name in names):
                raise UserError(f"no table {', '.join(names[:-1])} or {names[-1]} (.parquet or .csv) in {folder}")
        return cls(*(_read_merged(folders, name) for name in names))


def _read_merged(folders: Sequence[Path], name: str) -> pd.DataFrame:
    frames = {folder: read_table(folder, name) for folder in folders if table_path(folder, name)}
    if len(frames) < 2:
        return next(iter(frames.values()), _no_table())
    from lorabench.merge import merge_tables

    return merge_tables(name, frames)


def words(value: Any) -> list[str]:
    """Return a list column's value as a list of words; CSV files hold it as text, separated by spaces or commas."""
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return [] if value is None or (isinstance(value, float) and math.isnan(value)) else [str(part) for part in value]
