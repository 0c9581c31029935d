"""Finished runs of an unfinished preset, saved as small tables that the repository can hold, and restored from them.

There is one file per condition. It holds each run's record, its curves and its test losses, without weights and
checkpoints, and the protocol version that they were computed with. All numbers are exact.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import PROTOCOL_VERSION, Job, next_runs, validation_loss
from lorabench.store.collect import sweep_rows, write_entries, write_job
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import JOB
from lorabench.utils.files import atomic_path, digest, read_parquet

_VERSION = b"protocol_version"
_SCHEMA = pa.schema(
    [("run_id", pa.string()), ("record", pa.string()), JOB.field("curve"), JOB.field("test_losses")],
    metadata={_VERSION: str(PROTOCOL_VERSION)},
)


@dataclass(frozen=True)
class Restored:
    """How many runs and jobs were restored, and how many saved runs were not."""

    runs: int
    present: int
    """Saved runs that were there already."""
    unknown: int
    """Saved runs that the plan does not have."""
    jobs: int
    """Jobs that need no further training."""


def save_runs(plan: Plan, layout: Layout) -> tuple[int, int]:
    """Save the finished runs of a plan, whether or not their sweep is finished; runs saved earlier are kept.

    Returns:
        The number of saved runs, and the bytes of all files.

    Raises:
        UserError: a run or a saved file is damaged.
    """
    run_ids: dict[Path, set[str]] = {}
    for sweep in plan.sweeps:
        condition = sweep.condition
        path = layout.saved_runs / f"{condition.label}-{digest(asdict(condition), 8)}.parquet"
        run_ids.setdefault(path, set()).update(sweep.run_ids)
    saved = total = 0
    for path, planned in run_ids.items():
        rows = {row["run_id"]: row for row in _read(path) if row["run_id"] in planned} if path.exists() else {}
        for run_id in planned:
            folder = RunFolder(layout.runs, run_id)
            if folder.done():
                record = json.dumps(folder.read_record(), separators=(",", ":"))
                rows[run_id] = {"run_id": run_id, "record": record, **folder.read_nested()}
        if rows:
            table = pa.Table.from_pylist([rows[run_id] for run_id in sorted(rows)], schema=_SCHEMA)
            with atomic_path(path) as partial:
                pq.write_table(table, partial, compression="zstd", compression_level=15)
            saved, total = saved + len(rows), total + path.stat().st_size
    return saved, total


def restore_runs(plan: Plan, layout: Layout) -> Restored:
    """Write saved runs into the folders of runs, and the files of the jobs that need no further training.

    A run that is there already is left as it is. All files are checked before anything is written.

    Raises:
        UserError: a file is damaged or was computed with another protocol version, or no saved run is in the plan.
    """
    planned = {run.run_id for sweep in plan.sweeps for run in sweep.possible_runs()}
    rows = [row for path in sorted(layout.saved_runs.glob("*.parquet")) for row in _read(path)]
    known = [row for row in rows if row["run_id"] in planned]
    if rows and not known:
        raise UserError(
            f"none of the {len(rows)} runs in {layout.saved_runs} is in the plan of preset {layout.name}: its models, "
            "its data (such as the versions of the packages that they come from) or its settings have changed since"
        )
    missing = [row for row in known if not RunFolder(layout.runs, row["run_id"]).done()]
    for row in missing:
        run_id, folder = row["run_id"], RunFolder(layout.runs, row["run_id"])
        with folder.finishing() as staging:
            staged = RunFolder(staging.parent, staging.name)
            write_entries(run_id, row["curve"], "curves", staged.curves)
            if row["test_losses"] is not None:
                write_entries(run_id, row["test_losses"], "test_losses", staged.test_losses)
            staged.restored.touch()
            staged.record.write_text(row["record"] + "\n")
    jobs = [job for job in plan.jobs if missing and not layout.job(job).exists() and _restore_job(plan, job, layout)]
    return Restored(len(missing), len(known) - len(missing), len(rows) - len(known), len(jobs))


def _read(path: Path) -> list[dict[str, Any]]:
    table = read_parquet(path)
    version = (table.schema.metadata or {}).get(_VERSION, b"").decode()
    if version != str(PROTOCOL_VERSION):
        raise UserError(
            f"{path} holds runs of protocol version {version or 'unknown'}, but this code computes version "
            f"{PROTOCOL_VERSION}: their numbers can't be mixed; delete the file, or use the code that wrote it"
        )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _restore_job(plan: Plan, job: Job, layout: Layout) -> bool:
    """Write the file of a job whose runs are all there; return whether it was written.

    A job that reads the hub is not restored, because its commits are compared with those of its runs when it starts,
    nor one with weights that an evaluation needs.
    """
    rows: list[dict[str, Any]] = []
    for sweep in job.sweeps:
        condition = sweep.condition
        held_out = condition.rollouts.held_out if condition.rollouts else ()
        fetched = [layout.fetched_model(condition.model), *map(layout.fetched_data, (condition.dataset, *held_out))]
        if any(fetched) or any(evaluation.sweep == sweep for evaluation in plan.evaluations()):
            return False
        losses: dict[tuple[float, int], float] = {}
        folders: list[RunFolder] = []
        while wave := next_runs(sweep, losses):
            for run in wave:
                folders.append(RunFolder(layout.runs, run.run_id))
                if not folders[-1].done():
                    return False
                losses[run.lr, run.seed] = validation_loss(folders[-1].read_record())
        rows += sweep_rows(folders, sweep)
    write_job(rows, layout.job(job))
    layout.restored(job).touch()
    return True
