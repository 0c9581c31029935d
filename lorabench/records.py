"""A run's directory: one record in three blocks (spec, outcome, environment), its curves, its weights.

    runs/<run_id>/record.json      what was asked, what happened, what it ran on
    runs/<run_id>/curves.parquet   one row per step, split and metric
    runs/<run_id>/weights/         PEFT adapter, or the model of a full fine-tuning
    runs/<run_id>.partial/         a run in progress: its checkpoint, nothing that counts as a result

A run is written into a folder of its own and renamed when it is whole, so what has the right name is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` on success and is removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(value: Any, path: Path) -> None:
    """Write JSON, whole or not at all. NaN and infinity are refused: a missing number is null."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n")


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
        """The record of a finished run."""
        record: dict[str, Any] = json.loads(self.record.read_text())
        return record

    @contextmanager
    def finishing(self) -> Iterator[Path]:
        """A folder to write the finished run into; it becomes the run's folder on success."""
        staging = self.runs / f"{self.run_id}.finishing"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, self.final)
        shutil.rmtree(self.partial, ignore_errors=True)
