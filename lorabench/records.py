"""The folder of a run, and files that are written whole or not at all.

    runs/<run_id>/record.json      the run's spec, its outcome, and the environment that it ran in
    runs/<run_id>/curves.parquet   one row per step, split and metric
    runs/<run_id>/weights/         the PEFT adapter, or the fully fine-tuned model
    runs/<run_id>.partial/         a run in progress: its checkpoint, which is no result

A finished run is written into a temporary folder, which is renamed when all its files are on the disk. A folder with
the final name is therefore complete, even after a power cut. Two jobs on the same run take turns by a lock (lock.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.errors import UserError
from lorabench.exhausted import space_for

if TYPE_CHECKING:
    import pyarrow as pa


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it replaces `path` on success and is removed on failure.

    Raises:
        NoSpaceError: the disk is full; `path` keeps its old content.
    """
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with space_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _to_disk(partial)
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, so that its name does not survive a power cut without it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(value: Any, path: Path) -> None:
    """Write JSON, whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite; a missing number is written as null.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


def read_parquet(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Read a parquet file that can be made again.

    Raises:
        UserError: the file is damaged, or its columns are not those of the schema.
    """
    import pyarrow.parquet as pq

    with damage_told(path):
        return pq.read_table(path, schema=schema)


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turn the error of a parquet file that can't be read into a UserError: the file can be made again."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is damaged; delete it to have it made again ({reason})") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run's files in the folder `runs` of a preset's results."""

    runs: Path
    run_id: str

    @property
    def final(self) -> Path:
        return self.runs / self.run_id

    @property
    def partial(self) -> Path:
        return self.runs / f"{self.run_id}.partial"

    @property
    def _finishing(self) -> Path:
        return self.runs / f"{self.run_id}.finishing"

    @property
    def checkpoint(self) -> Path:
        return self.partial / "checkpoint.safetensors"

    @property
    def record(self) -> Path:
        return self.final / "record.json"

    @property
    def curves(self) -> Path:
        return self.final / "curves.parquet"

    @property
    def weights(self) -> Path:
        return self.final / "weights"

    def done(self) -> bool:
        """Return whether the run has ended, whether or not it diverged."""
        return self.record.is_file()

    def read_record(self) -> dict[str, Any]:
        """Read the record of a finished run.

        Raises:
            UserError: the record is missing or damaged.
        """
        with self._damage_explained():
            record: dict[str, Any] = json.loads(self.record.read_text())
        return record

    def read_curves(self) -> pa.Table:
        """Read the curves of a finished run.

        Raises:
            UserError: the curves are missing or damaged.
        """
        import pyarrow.parquet as pq

        with self._damage_explained():
            return pq.read_table(self.curves)

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise UserError(f"run {self.run_id} is damaged; delete {self.final} to have it trained again") from error

    def tidy(self) -> None:
        """Remove the half-written files of a killed job; the checkpoint stays until the run is finished."""
        shutil.rmtree(self._finishing, ignore_errors=True)
        if self.done():
            shutil.rmtree(self.partial, ignore_errors=True)
        for half_written in self.partial.glob(".*.partial"):
            half_written.unlink()

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """Yield a temporary folder for the finished run's files; it becomes the run's folder on success.

        Raises:
            NoSpaceError: the disk is full.
        """
        self.tidy()
        try:
            with space_for(self.final):
                self._finishing.mkdir(parents=True)
                yield self._finishing
                for path in self._finishing.rglob("*"):
                    if path.is_file():
                        _to_disk(path)
                shutil.rmtree(self.final, ignore_errors=True)
                os.replace(self._finishing, self.final)
        finally:
            shutil.rmtree(self._finishing, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)
