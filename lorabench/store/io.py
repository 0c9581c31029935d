"""Write and read tidy tables as parquet and CSV."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.errors import UserError
from lorabench.store.schemas import CLAIMS, PARQUET_ONLY, SCHEMAS
from lorabench.utils.files import add_checksum, atomic_path, check_parquet

MADE_FROM = b"made_from_sha256"
"""The key of a parquet file's metadata for the hash of what it was made from (`lorabench.store.made_from`)."""


def write_table(table: pa.Table, path: Path, made_from: str | None = None, **options: Any) -> None:
    """Write a parquet file with a checksum, whole or not at all; UserError says that the disk is full."""
    if made_from is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), MADE_FROM: made_from})
    with atomic_path(path) as partial:
        pq.write_table(table, partial, **options)
        add_checksum(partial)


def write_frame(
    frame: pd.DataFrame, name: str, out: Path, all_columns: bool = True, made_from: str | None = None
) -> None:
    """Write the tidy table `name` into the folder `out`, as parquet and, unless it is in PARQUET_ONLY, as CSV.

    It has all documented columns or, without `all_columns`, those of them that the frame has.
    """
    schema = pa.schema([field for field in SCHEMAS[name] if all_columns or field.name in frame])
    frame = frame.reindex(columns=schema.names)
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    write_table(table, out / f"{name}.parquet", made_from)
    if name not in PARQUET_ONLY:
        write_csv(frame, out / f"{name}.csv")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write CSV, whole or not at all; the words of a list are joined by spaces."""
    flat = frame.copy()
    for column in flat.columns[flat.dtypes == "object"]:
        if flat[column].map(lambda value: hasattr(value, "__len__") and not isinstance(value, str)).any():
            flat[column] = flat[column].map(lambda value: " ".join(map(str, value)))
    with atomic_path(path) as partial:
        flat.to_csv(partial, index=False)


def table_path(folder: Path, name: str) -> Path | None:
    """Return the parquet file of a tidy table, or else its CSV file; None if the folder has neither."""
    return next((path for kind in ("parquet", "csv") if (path := folder / f"{name}.{kind}").is_file()), None)


def read_table(folder: Path, name: str, optional: bool = False) -> pd.DataFrame:
    """Read a tidy table from a folder, parquet or else CSV, in the documented types.

    Documented columns may be missing, and other columns are kept. Integers are `Int64`, since they may be null; lists
    are lists of words. An `optional` table without a file is empty and has no columns. UserError says that there is no
    such file, that it can't be read, or that a column holds a value of another type.
    """
    path = table_path(folder, name)
    if path is None:
        if optional:
            return pd.DataFrame()
        raise UserError(f"no table {name}.parquet or {name}.csv in {folder}")
    try:
        if path.suffix == ".parquet":
            check_parquet(path)
            # The metadata of pandas would turn a column into the index.
            frame: pd.DataFrame = pq.read_table(path).to_pandas(ignore_metadata=True)
        else:
            # Text columns are not parsed: a run_id may consist of digits.
            text = {column.name: str for column in SCHEMAS[name] if pa.types.is_string(column.type)}
            with warnings.catch_warnings():
                # It would leave out the ends of rows that are longer than the header.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                frame = pd.read_csv(path, dtype=text, index_col=False)
            if len(frame.columns) == 1 and ";" in frame.columns[0]:
                raise UserError(f"{path} has its columns separated by semicolons; allowed: commas")
    except (pa.ArrowException, ValueError, OSError, pd.errors.ParserWarning) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} can't be read as a table: {reason}") from error
    return typed_columns(frame, name, path)


def read_claims(folder: Path, without: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read the table `claims` of a folder, which may lack the columns `without`, but no others, as older ones do."""
    claims = read_table(folder, "claims")
    if absent := [name for name in CLAIMS.names if name not in claims and name not in without]:
        raise UserError(
            f"the table claims in {folder} is from another version of lorabench, since it has no column "
            f"{', '.join(absent)}: judge the claims again with `lorabench claims`"
        )
    return claims


def typed_columns(frame: pd.DataFrame, name: str, path: Path) -> pd.DataFrame:
    """Return the table `name` with its documented columns in their types; others are kept, and errors name `path`."""
    columns = {column.name: column.type for column in SCHEMAS[name] if column.name in frame}
    return frame.assign(**{column: _typed(frame[column], kind, path) for column, kind in columns.items()})


def read_rows(folder: Path, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read some columns of a tidy table as one dict per row, with None for a missing value (see `read_table`)."""
    frame = read_table(folder, name).reindex(columns=list(columns)).astype(object)
    return [dict(zip(columns, row, strict=True)) for row in frame.where(frame.notna(), None).itertuples(index=False)]


def with_all_columns(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the table `name` with the documented columns that it lacks added, as nulls of their type."""
    absent = [column for column in SCHEMAS[name].names if column not in frame]
    nulls = pd.DataFrame(index=frame.index, columns=absent, dtype=object)
    return pd.concat([frame, typed_columns(nulls, name, Path(name))], axis="columns")


def _typed(column: pd.Series[Any], kind: pa.DataType, path: Path) -> pd.Series[Any]:
    """Convert a column to its documented type, or raise UserError if a value is not of that type."""
    typed: pd.Series[Any]
    numbers: pd.Series[Any] = column
    if pa.types.is_string(kind):
        if isinstance(column.dtype, pd.StringDtype):
            # Equal texts share one object: a table of curves has few, many times.
            codes, texts = pd.factorize(column)
            shared = np.array([*texts, None], dtype=object)
            return pd.Series(shared[codes], column.index, dtype=object, name=column.name)
        return column.map(str, na_action="ignore").astype(object).where(column.notna(), None)
    if pa.types.is_list(kind):
        what, valid = "list of words", column.map(lambda value: isinstance(value, str | Sequence | np.ndarray))
        typed = column.where(valid).map(list_of_words)
    elif pa.types.is_boolean(kind):
        truth = column.map(lambda value: {"true": True, "false": False}.get(str(value).lower()))
        what, valid, typed = "truth value", truth.notna(), truth.astype("boolean")
    else:
        if not pd.api.types.is_any_real_numeric_dtype(column):
            # No list, date or truth value is a number, and no integer beyond 64 bits can be one.
            real = column.map(
                lambda value: isinstance(value, (str, float, np.number)) or (type(value) is int and abs(value) < 2**63)
            )
            numbers = column.astype(object).where(real)
        numbers = pd.to_numeric(numbers, errors="coerce")
        what, valid, typed = "number", numbers.notna(), numbers.astype("float64")
        if pa.types.is_int64(kind):
            what, valid = "whole number", numbers.mod(1).eq(0) & numbers.abs().lt(2**63)
            typed = numbers.where(valid).astype("Int64")
    if len(wrong := column[column.notna() & ~valid]):
        raise UserError(f"{path}: column {column.name} has {wrong.tolist()[0]!r}, which is not a {what}")
    return typed


def list_of_words(value: Any) -> list[str]:
    """Return a list column's value as a list of words; CSV files hold it as text, separated by spaces or commas."""
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return [] if value is None or (isinstance(value, float) and math.isnan(value)) else [str(part) for part in value]
