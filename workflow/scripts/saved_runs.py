"""Finished runs of an unfinished preset, saved as small tables that the repository can hold, and restored from them.

Run it from the root of the repository: `python workflow/scripts/saved_runs.py save --preset overnight`, or `restore`.
A file holds the records, curves and test losses of a condition's runs, without weights, and the protocol version that
they were computed with. All numbers are exact.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import typer

from lorabench.cli.common import OneSentence, PresetOption, plan_and_layout
from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import PROTOCOL_VERSION
from lorabench.store.collect import entries, run_row, with_unrecorded
from lorabench.store.io import write_table
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import CURVES, JOB, RUN_TEST_LOSSES, RUNS, TEST_LOSSES
from lorabench.utils.files import digest, read_parquet

_VERSION = b"protocol_version"
_SCHEMA = pa.schema(
    [("run_id", pa.string()), ("record", pa.string()), JOB.field("curve"), JOB.field("test_losses")],
    metadata={_VERSION: str(PROTOCOL_VERSION)},
)
_POINT, _LOSS = "curve.list.element.", "test_losses.list.element."
_PARQUET: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 15,
    "use_dictionary": ["run_id", "record", f"{_POINT}split", f"{_POINT}metric", f"{_LOSS}tokens"],
    "column_encoding": dict.fromkeys((f"{_POINT}value", f"{_LOSS}loss"), "BYTE_STREAM_SPLIT")
    | dict.fromkeys((f"{_POINT}step", f"{_POINT}examples", f"{_POINT}tokens"), "DELTA_BINARY_PACKED"),
}
"""How a file is written: these encodings take 30% off the size of zstd alone."""


app = typer.Typer(cls=OneSentence, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def save(preset: PresetOption = "laptop") -> None:
    """Save the finished runs of an unfinished preset, without weights, in small files that the repository can hold."""
    planned, layout = plan_and_layout(preset)
    runs, size = save_runs(planned, layout)
    print(f"saved {runs} runs in {layout.saved_runs} ({size / 1e6:.2f} MB)")


@app.command()
def restore(preset: PresetOption = "laptop") -> None:
    """Restore the runs that were saved, so that the preset goes on from them."""
    planned, layout = plan_and_layout(preset)
    restored, present, unknown = restore_runs(planned, layout)
    print(f"restored {restored} runs from {layout.saved_runs}; {present} were there already")
    if unknown:
        print(f"{unknown} saved runs are not in the plan of preset {layout.name} and were left out")


def save_runs(plan: Plan, layout: Layout) -> tuple[int, int]:
    """Save the finished runs of a plan; those saved earlier are kept. Return their number, and the bytes of files."""
    run_ids: dict[Path, set[str]] = {}
    for sweep in plan.sweeps:
        condition = sweep.condition
        path = layout.saved_runs / f"{condition.label}-{digest(asdict(condition), 8)}.parquet"
        run_ids.setdefault(path, set()).update(sweep.run_ids)
    saved = total = 0
    for path, planned in run_ids.items():
        rows = {run_id: row for run_id, row in _read(path).items() if run_id in planned} if path.exists() else {}
        for folder in (RunFolder(layout.runs, run_id) for run_id in planned):
            if folder.done():
                record = json.dumps(folder.read_record(), separators=(",", ":"))
                columns = [[folder.run_id], [record], *folder.read_nested().columns]
                rows[folder.run_id] = pa.table(columns, schema=_SCHEMA)
        if rows:
            table = pa.concat_tables([rows[run_id] for run_id in sorted(rows)])
            write_table(table, path, **_PARQUET)
            saved, total = saved + len(rows), total + path.stat().st_size
    return saved, total


def restore_runs(plan: Plan, layout: Layout) -> tuple[int, int, int]:
    """Write saved runs into the folders of runs; a run that is there already is left as it is.

    Returns:
        The number of runs that were restored, that were there already, and that the plan does not have.
    """
    planned = {run.run_id for sweep in plan.sweeps for run in sweep.possible_runs()}
    rows = [row for path in sorted(layout.saved_runs.glob("*.parquet")) for row in _read(path).items()]
    known = [(run_id, row) for run_id, row in rows if run_id in planned]
    if rows and not known:
        changed = "its models, its data (such as the packages that they come from) or its settings have changed since"
        raise UserError(f"no run in {layout.saved_runs} is in the plan of preset {layout.name}: {changed}")
    missing = [(run_id, row) for run_id, row in known if not RunFolder(layout.runs, run_id).done()]
    for run_id, row in missing:
        with RunFolder(layout.runs, run_id).finishing(json.loads(row["record"][0].as_py())) as staging:
            staged = RunFolder(staging.parent, staging.name)
            write_table(entries(row, "curve", CURVES), staged.curves)
            if row["test_losses"].null_count == 0:
                write_table(entries(row, "test_losses", RUN_TEST_LOSSES), staged.test_losses)
            staged.restored.touch()
    return len(missing), len(known) - len(missing), len(rows) - len(known)


def saved_tables(plan: Plan, layout: Layout) -> dict[str, pa.Table]:
    """Return the tables `runs`, `curves` and `test_losses` of saved runs.

    Runs that the plan does not have (any more) have no experiments. The groups of test examples are null, since
    they are in the data, which are not saved.
    """
    experiments = {run.run_id: sweep.experiments for sweep in plan.sweeps for run in sweep.possible_runs()}
    rows = (row for path in sorted(layout.saved_runs.glob("*.parquet")) for row in _read(path).values())
    saved = pa.concat_tables(rows)
    records = map(json.loads, saved["record"].to_pylist())
    runs = [run_row(record, experiments.get(record["run_id"], ())) for record in records]
    losses = entries(saved.filter(pc.is_valid(saved["test_losses"])), "test_losses", RUN_TEST_LOSSES)
    return {
        "runs": with_unrecorded(pa.Table.from_pylist(runs, schema=RUNS), layout.preset),
        "curves": entries(saved, "curve", CURVES),
        "test_losses": losses.append_column(TEST_LOSSES.field("group"), pa.nulls(len(losses), pa.string())),
    }


def _read(path: Path) -> dict[str, pa.Table]:
    """Return the row of each run in a file of saved runs, of this protocol version (else UserError)."""
    table = read_parquet(path)
    version = (table.schema.metadata or {}).get(_VERSION, b"").decode()
    if version != str(PROTOCOL_VERSION):
        computed = f"but this code computes version {PROTOCOL_VERSION}; delete the file, or use the code that wrote it"
        raise UserError(f"{path} holds runs of protocol version {version or 'unknown'}, {computed}")
    return {run_id: table.slice(number, 1) for number, run_id in enumerate(table["run_id"].to_pylist())}


if __name__ == "__main__":
    app()
