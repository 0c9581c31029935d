"""What a table, a picture or a page was made from: each names the SHA-256 of it, by which it can be held against that.

A parquet file names it in its metadata, and an SVG or PNG file as its source. A CSV file can't name it; the parquet
file beside it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from lorabench.store.io import MADE_FROM, table_path
from lorabench.store.run_folder import RunFolder
from lorabench.utils.files import digest, file_sha256

SOURCE = re.compile(r"<dc:source>([0-9a-f]{64})</dc:source>")
"""Where an SVG file names what it was made from."""


def of_files(files: Iterable[tuple[str, Path]], *further: str) -> str:
    """Return the SHA-256 of files by name, in hexadecimal, and of what else something was made from."""
    return digest([sorted((name, file_sha256(path)) for name, path in files), *further], 64)


def of_runs(runs: Path, run_ids: Iterable[str]) -> str:
    """Return the SHA-256 of the records of runs, which have the checksums of the runs' other files."""
    return of_files((run_id, file) for run_id in run_ids if (file := RunFolder(runs, run_id).record).is_file())


def of_tables(folders: Sequence[Path], names: Sequence[str], *further: str) -> str:
    """Return the SHA-256 of those tables of some names that the folders hold."""
    return of_files(
        ((name, path) for folder in folders for name in names if (path := table_path(folder, name))), *further
    )


def named_in(path: Path) -> str | None:
    """Return the SHA-256 of what a parquet or SVG file says that it was made from; None if it does not say."""
    if path.suffix == ".parquet":
        return (pq.read_schema(path).metadata or {}).get(MADE_FROM, b"").decode() or None
    return next(iter(SOURCE.findall(path.read_text(encoding="utf-8"))), None)
