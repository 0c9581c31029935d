"""The rows of a source's files, whatever their format, as one table of text.

Nested values are flattened: `{"a": {"b": 1}}` has the column `a.b`. The last entry of PEFT's list of metrics, which
holds the results after training, has the columns `train_info.metrics.last.*`.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.errors import UserError
from lorabench.sources.schema import FileOf


def read_rows(folder: Path, of: FileOf) -> pd.DataFrame:
    """Read the rows of a file, or of several files, as text; a missing value is null.

    Raises:
        UserError: there is no such file, its hash is another one, or it is not of the stated format.
    """
    paths = _paths(folder, of)
    try:
        match of.format:
            case "csv":
                frames = [_csv(path) for path in paths]
            case "jsonl":
                frames = [_frame(_lines(path)) for path in paths]
            case "peft":
                frames = [_frame([_peft(path) for path in paths])]
            case "wandb":
                frames = [_sqlite(path, of.table) if _is_sqlite(path) else _csv(path) for path in paths]
    except (ValueError, KeyError, TypeError, sqlite3.Error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder / of.file} can't be read as {of.format}: {reason}") from error
    return pd.concat(frames, ignore_index=True)


def hash_of(folder: Path, pattern: str) -> str:
    """Return the SHA-256 of the files of a pattern, one after the other, by name."""
    content = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        content.update(path.read_bytes())
    return content.hexdigest()


def _paths(folder: Path, of: FileOf) -> list[Path]:
    paths = sorted(path for path in folder.glob(of.file) if path.is_file())
    if not paths:
        raise UserError(f"{folder / of.file}: there is no such file")
    measured = hash_of(folder, of.file)
    if measured != of.sha256:
        raise UserError(
            f"{folder / of.file} has changed: its SHA-256 is {measured}, and {folder / 'source.yaml'} says {of.sha256}"
        )
    return paths


def _csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, na_values=[""], keep_default_na=False)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [_flat(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _peft(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text(encoding="utf-8"))
    metrics = result["train_info"].pop("metrics")
    if not isinstance(metrics, list) or not metrics:
        raise ValueError(f"{path.name} has no metrics")
    result["train_info"]["metrics"] = {"last": metrics[-1]}
    return {"file": path.name, **_flat(result)}


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(15) == b"SQLite format 3"


def _sqlite(path: Path, table: str | None) -> pd.DataFrame:
    """Read a table of a SQLite file; a column that holds JSON objects, such as `config`, is flattened."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        names = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        if table not in names:
            raise ValueError(f"no table {table!r}; it has {', '.join(sorted(names)) or 'none'}")
        cursor = database.execute(f'select * from "{table}"')
        columns = [column[0] for column in cursor.description]
        rows = [dict(zip(columns, row, strict=True)) for row in cursor]
    return _frame([_flat({key: _parsed(value) for key, value in row.items()}) for row in rows])


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def _flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no object")
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{before}{key}"
        flat |= _flat(inner, f"{name}.") if isinstance(inner, dict) else {name: inner}
    return flat


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, dtype=object)
    return frame.map(lambda value: None if value is None else value if isinstance(value, str) else json.dumps(value))
