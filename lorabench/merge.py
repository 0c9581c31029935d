"""Merge the tidy tables of several machines, where they agree."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from lorabench.analysis.arms import check_curves, check_table
from lorabench.errors import UserError
from lorabench.tables import SCHEMAS, read_table, table_path, words, write_csv, write_table

KEYS = {
    "runs": ["run_id"],
    "curves": ["run_id", "step", "split", "metric"],
    "compute": ["model", "method", "rank", "placement", "batch_size", "sequence_length", "device", "threads"],
    "counts": ["architecture", "placement", "part", "rank", "include_unembedding"],
    "evals": [
        *("run_id", "model", "dataset", "task", "metric", "filter", "num_fewshot", "n_samples"),
        *("eval_batch_size", "task_version", "template_sha256"),
    ],
}
"""What tells the rows of a table apart."""

MAY_DIFFER = {
    "runs": [
        *("wall_s", "peak_mem_bytes", "device", "threads", "host"),
        *("started", "git_sha", "git_dirty_patch", "versions"),
    ],
    "compute": ["step_s", "peak_mem_bytes"],
    "evals": ["versions"],
}
"""Columns that tell of the machine and not of the result: the first folder's are kept."""


def merge(folders: list[Path], out: Path) -> None:
    """Merge the tables in KEYS of several folders into the folder `out`, parquet and CSV.

    Of the documented columns those are written that some folder has; they are null in rows from where they are missing.

    Args:
        folders: each with any of the tables, parquet or else CSV.
        out: where to; it may be one of them. Nothing is written if anything contradicts.

    Raises:
        UserError: a folder holds no table, or one that can't be read; see `merge_tables`, `check_table` and
            `check_curves`.
    """
    for folder in folders:
        if not any(table_path(folder, name) for name in KEYS):
            raise UserError(f"no table {', '.join(KEYS)} (.parquet or .csv) in {folder}")
    merged = {}
    for name in KEYS:
        found = {folder: read_table(folder, name) for folder in folders if table_path(folder, name)}
        if found:
            merged[name] = merge_tables(name, found)
    check_table(merged.get("runs", pd.DataFrame()))
    check_curves(merged.get("curves", pd.DataFrame()))
    for name, frame in merged.items():
        schema = pa.schema([field for field in SCHEMAS[name] if field.name in frame])
        write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), out / f"{name}.parquet")
        write_csv(frame, out / f"{name}.csv")


def merge_tables(name: str, frames: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """One table out of several of a kind: rows with the same KEYS become one, with the experiments of all of them.

    Args:
        name: of the table.
        frames: by the folder that each is from, typed as by `read_table`.

    Returns:
        The table in its documented columns, rows in the order in which they first appear.

    Raises:
        UserError: a column of KEYS is missing in some of the tables only, or rows with the same KEYS differ in a
            column that is not in MAY_DIFFER.
    """
    columns = [field.name for field in SCHEMAS[name] if any(field.name in frame for frame in frames.values())]
    keys = [key for key in KEYS[name] if key in columns or name in ("runs", "curves")]
    for folder, frame in frames.items():
        if missing := [key for key in keys if key not in frame]:
            raise UserError(f"the table {name} in {folder} has no column {', '.join(missing)}")
    every = pd.concat({str(folder): frame for folder, frame in frames.items()}, names=["folder", None])[keys]
    row_of = every.groupby(keys, dropna=False, sort=False).ngroup()
    merged = {}
    for column in columns:
        # Tables that lack the column say nothing about it.
        values = pd.concat({str(folder): frame[column] for folder, frame in frames.items() if column in frame})
        row = row_of[values.index]
        first = values[~row.duplicated()].set_axis(row[~row.duplicated()])
        if column == "experiments":
            first = values.groupby(row.to_numpy()).agg(lambda lists: list(dict.fromkeys(chain(*lists))))
        elif column not in MAY_DIFFER.get(name, ()):
            expected = row.map(first)
            other = values[~((values == expected).fillna(False) | (values.isna() & expected.isna())).astype(bool)]
            if len(other):
                raise UserError(f"{name}: {_contradiction(every.loc[other.index[0]], column, values, row)}")
        merged[column] = first
    table = pd.DataFrame(merged, columns=columns)
    if "experiments" in table:
        table["experiments"] = table["experiments"].map(words)
    return table


def _contradiction(key: pd.Series[Any], column: str, values: pd.Series[Any], row: pd.Series[int]) -> str:
    """Which value of a row contradicts which, and where they are from."""
    told = " ".join(f"{name} {value}" for name, value in key.items() if not pd.isna(value))
    of_row = values[row.eq(row.to_dict()[key.name])]
    folders = of_row.index.get_level_values(0)
    seen = [f"{value!r} in {folder}" for folder, value in zip(folders, of_row.tolist(), strict=True)]
    return f"{told} has {column} = {' and '.join(seen)}"
