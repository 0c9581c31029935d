"""Files that are written whole or not at all, one sentence about a damaged file, hashes, and the packaged files.

The package needs the workflow with its presets and published numbers: in a clone,
`lorabench/packaged` holds links to the repository's files, in a wheel copies of them.

Parquet detects neither a changed byte of a page nor most changes of the footer. So a file's checksum lies between its
data and its footer, where other readers skip it. Unlike an entry of the metadata, it is not copied into a file that
another program makes of the table. Hashing takes two to three seconds a GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorabench.errors import UserError
from lorabench.utils.exhaustion import space_for

if TYPE_CHECKING:
    import pyarrow as pa

_PACKAGED = Path(__file__).parents[1] / "packaged"
WORKFLOW = _PACKAGED / "workflow"
SNAKEFILE = WORKFLOW / "Snakefile"
REFERENCE = _PACKAGED / "reference"
"""Published numbers, each with its source (SOURCES.md)."""
_MARK = b"\xfflorabench\xffseal\xff"
"""Stands before and after a checksum, so that a flipped bit in one of them does not hide that there is one. No text in
a table holds it, since it is not valid UTF-8."""
_TAIL = 1 << 20
"""The bytes at the end of a file in which the checksum is looked for; a footer takes about 100 bytes for each column of
each million rows."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` on success and is removed on failure.

    UserError says that the disk is full, or that `path` can't be written or is no regular file.
    """
    # A name may have 255 bytes.
    name = path.name if len(os.fsencode(path.name)) <= 150 else digest(path.name)
    partial = path.with_name(f".{name}.{platform.node()}.{os.getpid()}.partial")
    with space_for(path):
        if path.exists() and not path.is_file():
            raise UserError(f"{path} can't be written: it exists and is no regular file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise UserError(f"{path} can't be written: no folder can be made there") from error
        try:
            yield partial
            flush_to_disk(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, so that its name does not survive a power cut without it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(value: Any, path: Path) -> None:
    """Write JSON, whole or not at all; ValueError if a number is NaN or infinite: a missing one is written as null."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


def read_parquet(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a parquet file of the workflow; UserError if it is damaged, or its columns have other types.

    Of the schema's columns, those that an older file lacks are null; without a schema all columns are returned.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # PyArrow's threads wait forever for one that had no memory to start, so the file is read without them.
    with damage_explained(path), pq.ParquetFile(path) as file:
        if schema is None:
            return file.read(use_threads=False)
        there = [name for name in schema.names if name in file.schema_arrow.names]
        table = file.read(there, use_threads=False)
        merged = pa.concat_tables([schema.empty_table(), table], promote_options="permissive")
        return merged.select(schema.names).cast(schema)


def add_checksum(path: Path) -> None:
    """Add the checksum to a parquet file that was just written."""
    with path.open("r+b") as file:
        # The length of the footer stands before the last four bytes.
        file.seek(-8, os.SEEK_END)
        start = file.tell() - int.from_bytes(file.read(4), "little")
        seal = _seal(file, start, start)
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(seal + footer)


def check_parquet(path: Path) -> None:
    """Raise UserError if a parquet file's content differs from what was written, unless it has no checksum."""
    with path.open("rb") as file:
        tail = max(file.seek(0, os.SEEK_END) - _TAIL, 0)
        file.seek(tail)
        if mark := re.search(re.escape(_MARK), file.read()):
            start = tail + mark.start()
            end = start + 2 * len(_MARK) + hashlib.sha256().digest_size
            file.seek(start)
            if file.read(end - start) != _seal(file, start, end):
                raise UserError(_damaged(path, "its checksum is not that of its content"))


def _seal(file: BinaryIO, start: int, footer: int) -> bytes:
    """Return the marked checksum of all bytes but those from `start` to the footer."""
    file.seek(footer)
    digest = hashlib.sha256(file.read())
    file.seek(0)
    for at in range(0, start, _TAIL):
        digest.update(file.read(min(_TAIL, start - at)))
    return _MARK + digest.digest() + _MARK


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} is damaged; delete it to have it made again, in a preset's results by `lorabench run PRESET {path}` "
        f"({reason})"
    )


@contextmanager
def damage_explained(path: Path) -> Iterator[None]:
    """Check a parquet file, and turn the error if it can't be read into a UserError, which says to delete the file."""
    import pyarrow as pa

    try:
        check_parquet(path)
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        if "launch worker thread" in reason:
            raise MemoryError(reason) from error
        raise UserError(_damaged(path, reason)) from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any, length: int = 12) -> str:
    """Return the first `length` hexadecimal digits of the SHA-256 of plain data, as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]
