"""Rows of parquet and JSON lines files, a batch at a time: no file is ever held in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from lorabench.errors import UserError

# Examples of reasoning datasets take 50 kB each.
_BATCH = 256


def read_rows(files: Iterable[Path], choose: Callable[[Collection[str], str], list[str]]) -> Iterator[dict[str, Any]]:
    """The rows of some files.

    Args:
        choose: the columns to read, given those there are and where; raises UserError if one is missing.

    Raises:
        UserError: a file of another kind, a column that is missing, or a line that is no JSON.
    """
    for file in files:
        match file.suffix:
            case ".parquet":
                with pq.ParquetFile(file) as parquet:
                    columns = choose(parquet.schema_arrow.names, str(file))
                    for batch in parquet.iter_batches(batch_size=_BATCH, columns=columns):
                        yield from batch.to_pylist()
            case ".jsonl":
                for where, row in _json_rows(file):
                    yield {name: row[name] for name in choose(row, where)}
            case _:
                raise UserError(f"{file} is neither .parquet nor .jsonl, the kinds of data files that are read")


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Texts hold other line ends, such as U+2028, that are none here.
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is no JSON: {error}") from error
            yield where, row


def local_files(folder: Path, split: str) -> list[Path]:
    """The data files of a split in a folder that holds a copy of a repository, or of one configuration of it.

    Raises:
        UserError: there are none.
    """
    files = [file for file in sorted(folder.rglob(f"{split}*")) if file.suffix in (".parquet", ".jsonl")]
    if not files:
        raise UserError(f"folder {folder} has no {split}*.parquet or {split}*.jsonl")
    return files
