"""A run's directory: one record in three blocks (spec, outcome, environment), its curves, its weights.

    runs/<run_id>/record.json      what was asked, what happened, what it ran on
    runs/<run_id>/curves.parquet   one row per step, split and metric
    runs/<run_id>/weights/         PEFT adapter, or the model of a full fine-tuning
    runs/<run_id>.partial/         a run in progress: its checkpoint, nothing that counts as a result

A run is written into a folder of its own and renamed when it is whole and on the disk, so what has the right name is
complete, even after a power cut. Jobs on one run take turns by a lock (lock.py).
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
    """A path to write to that takes the place of `path` on success and is removed on failure.

    Raises:
        NoSpaceError: the disk is full; what `path` held is still there.
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
    """Wait until a file's content is on the disk: a name must not survive a power cut without it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(value: Any, path: Path) -> None:
    """Write JSON, whole or not at all. NaN and infinity are refused: a missing number is null."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


def read_parquet(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """A parquet file that can be made again.

    Raises:
        UserError: it is damaged, or has other columns.
    """
    import pyarrow.parquet as pq

    with damage_told(path):
        return pq.read_table(path, schema=schema)


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raise UserError where a parquet file, which can be made again, can't be read."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is damaged; delete it to have it made again ({reason})") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """The places of one run under a preset's results."""

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
        """Whether the run ended, well or diverged."""
        return self.record.is_file()

    def read_record(self) -> dict[str, Any]:
        """The record of a finished run.

        Raises:
            UserError: it is damaged.
        """
        with self._damage_told():
            record: dict[str, Any] = json.loads(self.record.read_text())
        return record

    def read_curves(self) -> pa.Table:
        """The curves of a finished run.

        Raises:
            UserError: they are damaged.
        """
        import pyarrow.parquet as pq

        with self._damage_told():
            return pq.read_table(self.curves)

    @contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise UserError(f"run {self.run_id} is damaged; delete {self.final} to have it trained again") from error

    def tidy(self) -> None:
        """Remove what a killed job left and nobody goes on from; a checkpoint stays until its run is finished."""
        shutil.rmtree(self._finishing, ignore_errors=True)
        if self.done():
            shutil.rmtree(self.partial, ignore_errors=True)
        for rest in self.partial.glob(".*.partial"):
            rest.unlink()

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """A folder to write the finished run into; it becomes the run's folder on success."""
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
