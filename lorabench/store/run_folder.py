"""The folder of a run, which gets its final name when it is complete.

    runs/<run_id>/record.json      the run's spec, its outcome, and the environment that it ran in
    runs/<run_id>/curves.parquet   one row per step, split and metric
    runs/<run_id>/test_losses.parquet  one row per test example
    runs/<run_id>/weights/         the PEFT adapter, or the fully fine-tuned model, with a README.md
    runs/<run_id>/restored         an empty file in a run that was restored from the repository, without its weights
    runs/<run_id>.partial/         a run in progress: its checkpoint, which is no result

A finished run is written into a temporary folder, which is renamed when all its files are on the disk. A folder with
the final name is therefore complete, even after a power cut. Two jobs on the same run take turns by a lock
(`lorabench.utils.lock`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from lorabench.errors import UserError
from lorabench.store.schemas import JOB
from lorabench.utils.exhaustion import space_for
from lorabench.utils.files import flush_to_disk, read_parquet

RECORD = "record.json"
"""The name of a run's record in its folder; a run that has one is finished."""


class RunFolder:
    """The paths of one run's files in the folder `runs` of a preset's results."""

    def __init__(self, runs: Path, run_id: str) -> None:
        self.run_id = run_id
        self.final, self.partial = runs / run_id, runs / f"{run_id}.partial"
        self._finishing = runs / f"{run_id}.finishing"
        self.checkpoint = self.partial / "checkpoint.safetensors"
        self.record, self.curves = self.final / RECORD, self.final / "curves.parquet"
        self.test_losses = self.final / "test_losses.parquet"
        self.weights, self.restored = self.final / "weights", self.final / "restored"

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

    def read_nested(self) -> pa.Table:
        """Read the curves and test losses of a finished run: one row with the columns `curve` and `test_losses` of JOB.

        The latter is null for a run that was made before test losses were kept.

        Raises:
            UserError: one of the files is damaged, or the curves are missing.
        """
        nested = {}
        with self._damage_explained():
            for name, path in (("curve", self.curves), ("test_losses", self.test_losses)):
                kind = JOB.field(name).type
                if name == "test_losses" and not path.is_file():
                    nested[name] = pa.nulls(1, kind)
                    continue
                table = read_parquet(path, pa.schema(list(kind.value_type)))
                points = table.to_struct_array().combine_chunks()
                nested[name] = pa.ListArray.from_arrays([0, len(table)], points, type=kind)
        return pa.table(nested)

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, UserError) as error:
            raise UserError(f"run {self.run_id} is damaged; delete {self.final} to have it trained again") from error

    def tidy(self) -> None:
        """Remove the half-written files of a killed job; the checkpoint stays until the run is finished."""
        shutil.rmtree(self._finishing, ignore_errors=True)
        if self.done():
            shutil.rmtree(self.partial, ignore_errors=True)
        for half_written in self.partial.glob(".*.partial"):
            half_written.unlink()

    def discard(self) -> None:
        """Remove a finished run at once, so that it is trained again."""
        self.tidy()
        os.replace(self.final, self._finishing)
        self.tidy()

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
                        flush_to_disk(path)
                shutil.rmtree(self.final, ignore_errors=True)
                os.replace(self._finishing, self.final)
        finally:
            shutil.rmtree(self._finishing, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)
