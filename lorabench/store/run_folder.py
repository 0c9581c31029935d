"""The folder of a run, which gets its final name when it is complete.

    runs/<run_id>/record.json      the run's spec, its outcome, and the environment that it ran in
    runs/<run_id>/curves.parquet   one row per step, split and metric
    runs/<run_id>/test_losses.parquet  one row per test example
    runs/<run_id>/weights/         the PEFT adapter, or the fully fine-tuned model, with a README.md
    runs/<run_id>/restored         an empty file in a run that was restored from the repository, without its weights
    runs/<run_id>.partial/         a run in progress: its checkpoint, which is no result

A finished run is written into a temporary folder, which is renamed when all its files are on the disk. A folder with
the final name is therefore complete, even after a power cut. Its record has the checksums of the other files and of
itself, which are checked when a file is read; records of earlier versions have none. Two jobs on the same run take
turns by a lock (`lorabench.utils.lock`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from lorabench.errors import UserError
from lorabench.runs import Condition, Run
from lorabench.store.schemas import JOB
from lorabench.utils.exhaustion import space_for
from lorabench.utils.files import file_sha256, flush_to_disk, read_parquet

RECORD = "record.json"
"""The name of a run's record in its folder; a run that has one is finished."""

# The blocks of a record, each with the entries that are read without asking whether they are there.
_BLOCKS = {
    "spec": {"protocol", "lr", "seed", *(field.name for field in fields(Condition))},
    "outcome": {"status"},
    "environment": {"model_sha256", "packages"},
}
# The entries of a record with the checksums of the run's other files, and of the record itself.
_CHECKSUMS = {"files", "sha256"}


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
        """Read the record of a finished run, without checksums; UserError if it is damaged or not that of this run."""
        with self._damage_explained():
            return {name: value for name, value in self._whole_record().items() if name in ("run_id", *_BLOCKS)}

    def read_nested(self) -> pa.Table:
        """Read the curves and test losses of a finished run: one row with the columns `curve` and `test_losses` of JOB.

        The latter is null for a run that was made before test losses were kept. UserError says that a file is damaged
        or is not that of this run.
        """
        self.check_files(self.curves, self.test_losses)
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

    def _whole_record(self) -> dict[str, Any]:
        """Return the record with its checksums, or raise ValueError or OSError."""
        text = self.record.read_text(encoding="utf-8")
        record = json.loads(text)
        if not isinstance(record, dict) or record.keys() - _CHECKSUMS != {"run_id", *_BLOCKS}:
            raise ValueError(f"{RECORD} does not have the entries of a record")
        if record.keys() & _CHECKSUMS and text != _with_checksum(record):
            raise ValueError(f"the checksum of {RECORD} is not that of its content")
        for name, entries in _BLOCKS.items():
            if not isinstance(record[name], dict) or entries - record[name].keys():
                raise ValueError(f"{RECORD} has an incomplete {name}")
        if not self.run_id == record["run_id"] == Run.of(record["spec"]).run_id:
            raise ValueError(f"{RECORD} is of another run")
        return record

    def check_files(self, *paths: Path) -> None:
        """Raise UserError if a file of a finished run, or in a folder of it, is damaged, missing or of another run.

        A run of an earlier version has no checksums.
        """
        with self._damage_explained():
            listed: Mapping[str, str] = self._whole_record().get("files", {})
            names = [name for name in listed if any((self.final / name).is_relative_to(path) for path in paths)]
            for name in dict.fromkeys([*names, *(path.name for path in paths if listed and path.is_file())]):
                path = self.final / name
                if not path.is_file() or file_sha256(path) != listed.get(name):
                    raise ValueError(f"{name} is not the file that the run wrote")

    @contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, RecursionError, OSError, UserError) as error:
            # What its job's file holds counts as trained, whatever the folder has.
            ids, files = pa.schema([JOB.field("run_id")]), sorted(self.final.parents[1].glob("jobs/*.parquet"))
            jobs = [str(path) for path in files if self.run_id in read_parquet(path, ids)["run_id"].to_pylist()]
            command = f", by `lorabench run PRESET {' '.join(jobs)}`" if jobs else ""
            raise UserError(
                f"run {self.run_id} is damaged ({error}); delete {' and '.join([str(self.final), *jobs])} to have it "
                f"trained again{command}"
            ) from error

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
    def finishing(self, record: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a temporary folder for the finished run's files but its record; it becomes the run's folder on success.

        UserError says that the disk is full.
        """
        self.tidy()
        try:
            with space_for(self.final):
                self._finishing.mkdir(parents=True)
                yield self._finishing
                files = [path for path in self._finishing.rglob("*") if path.is_file()]
                # The page that PEFT writes beside an adapter may be edited.
                checked = sorted(path for path in files if path.suffix != ".md")
                sums = {str(path.relative_to(self._finishing)): file_sha256(path) for path in checked}
                written = self._finishing / RECORD
                written.write_text(_with_checksum({**record, "files": sums}), encoding="utf-8")
                for path in (*files, written):
                    flush_to_disk(path)
                shutil.rmtree(self.final, ignore_errors=True)
                os.replace(self._finishing, self.final)
        finally:
            shutil.rmtree(self._finishing, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)


def _with_checksum(record: Mapping[str, Any]) -> str:
    """Return the text of a record with its checksum, in the place of one that it has."""
    rest = {name: value for name, value in record.items() if name != "sha256"}
    checksum = hashlib.sha256(json.dumps(rest, allow_nan=False).encode()).hexdigest()
    return json.dumps(rest | {"sha256": checksum}, indent=2, allow_nan=False) + "\n"
