"""Merging the tidy tables of several machines, which must not contradict each other."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.errors import UserError
from lorabench.store.checks import check_curves, check_evals, check_table
from lorabench.store.io import list_of_words, read_table, table_path, write_known_columns
from lorabench.store.schemas import SCHEMAS
from lorabench.store.stand_ins import with_stand_ins

KEYS = {
    "runs": ["run_id"],
    "curves": ["run_id", "step", "split", "metric"],
    "test_losses": ["run_id", "example"],
    "compute": ["model", "method", "rank", "placement", "batch_size", "sequence_length", "device", "threads"],
    "counts": ["architecture", "placement", "part", "rank", "include_unembedding"],
    "evals": [
        *("run_id", "model", "dataset", "task", "metric", "filter", "num_fewshot", "n_samples"),
        *("sampler", "eval_batch_size", "task_version", "template_sha256"),
    ],
}
"""The columns that identify a row of each table."""

MAY_DIFFER = {
    "runs": [
        *("wall_s", "peak_mem_bytes", "device", "threads", "host"),
        *("started", "git_sha", "git_dirty_patch", "versions"),
    ],
    "compute": ["step_s", "peak_mem_bytes"],
    "evals": ["versions"],
}
"""Columns that describe the machine, in which rows may differ; the first folder's values are kept."""


def merge(folders: list[Path], out: Path) -> None:
    """Merge the tables in KEYS of several folders into the folder `out`, as parquet and CSV.

    The merged tables have the documented columns that at least one folder has, null in the rows of the other folders.

    Args:
        folders: folders that each hold one or more of the tables, as parquet or CSV.
        out: the folder of the merged tables, which may be one of `folders`. Nothing is written if tables contradict.

    Raises:
        UserError: a folder holds no table, a table can't be read or is not valid (see `check_table`, `check_curves`
            and `check_evals`), or tables contradict each other (see `merge_tables`).
    """
    for folder in folders:
        if not any(table_path(folder, name) for name in KEYS):
            raise UserError(f"no table {', '.join(KEYS)} (.parquet or .csv) in {folder}")
    merged = {}
    for name in KEYS:
        frames = {folder: read_table(folder, name) for folder in folders if table_path(folder, name)}
        if frames:
            merged[name] = merge_tables(name, frames)
    check_table(with_stand_ins(merged.get("runs", pd.DataFrame())))
    check_curves(merged.get("curves", pd.DataFrame()))
    check_evals(merged.get("evals", pd.DataFrame()))
    for name, frame in merged.items():
        write_known_columns(frame, name, out)


def merge_tables(name: str, frames: dict[Path, pd.DataFrame]) -> pd.DataFrame:
    """Merge tables of one kind: rows with the same KEYS become one row, with the experiments of all of them.

    Args:
        name: the name of the table.
        frames: the tables by the folder that they are from, typed as by `read_table`.

    Returns:
        The table in its documented columns, rows in the order in which they first appear.

    Raises:
        UserError: some tables lack a column of KEYS that others have, or rows with the same KEYS differ in a column
            that is not in MAY_DIFFER.
    """
    columns = [field.name for field in SCHEMAS[name] if any(field.name in frame for frame in frames.values())]
    keys = [key for key in KEYS[name] if key in columns or name in ("runs", "curves", "test_losses")]
    for folder, frame in frames.items():
        if missing := [key for key in keys if key not in frame]:
            raise UserError(f"the table {name} in {folder} has no column {', '.join(missing)}")
    all_keys = pd.concat({str(folder): frame for folder, frame in frames.items()}, names=["folder", None])[keys]
    row_of = all_keys.groupby(keys, dropna=False, sort=False).ngroup()
    merged = {}
    for column in columns:
        # A table that lacks the column does not contradict the others.
        values = pd.concat({str(folder): frame[column] for folder, frame in frames.items() if column in frame})
        row = row_of[values.index]
        first = values[~row.duplicated()].set_axis(row[~row.duplicated()])
        if column == "experiments":
            first = values.groupby(row.to_numpy()).agg(lambda lists: list(dict.fromkeys(chain(*lists))))
        elif column not in MAY_DIFFER.get(name, ()):
            expected = row.map(first)
            other = values[~((values == expected).fillna(False) | (values.isna() & expected.isna())).astype(bool)]
            if len(other):
                raise UserError(f"{name}: {_contradiction(all_keys.loc[other.index[0]], column, values, row)}")
        merged[column] = first
    table = pd.DataFrame(merged, columns=columns)
    if "experiments" in table:
        table["experiments"] = table["experiments"].map(list_of_words)
    return table


def _contradiction(key: pd.Series[Any], column: str, values: pd.Series[Any], row: pd.Series[int]) -> str:
    """Describe the values of one row that contradict each other, with the folders that they are from."""
    row_name = " ".join(f"{name} {value}" for name, value in key.items() if not pd.isna(value))
    of_row = values[row.eq(row.to_dict()[key.name])]
    folders = of_row.index.get_level_values(0)
    values_in = [f"{value!r} in {folder}" for folder, value in zip(folders, of_row.tolist(), strict=True)]
    return f"{row_name} has {column} = {' and '.join(values_in)}"
