"""The command that checks a machine before a preset is run on it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from lorabench.cli.errors import in_one_sentence
from lorabench.cli.preset_option import PresetOption, plan_and_layout
from lorabench.utils.devices import own_devices, reduce_fragmentation

if TYPE_CHECKING:
    # Imported when the command runs, since the help needs neither.
    from lorabench.doctor.record import Check, Record

app = typer.Typer()


@app.command(rich_help_panel="Commands")
def doctor(
    preset: PresetOption = "laptop",
    processes: Annotated[
        int, typer.Option(min=1, help="Also check training by this number of processes, one per GPU.")
    ] = 1,
) -> None:
    """Check this machine for a preset in at most half an hour: numbers, speed, memory, and how work continues.

    Writes results/doctor/<device>.json, from which `lorabench plan` takes the speed, and exits with status 1 if a check
    failed.
    """
    with in_one_sentence(), ExitStack() as contexts:
        planned, layout = plan_and_layout(preset)
        if planned.preset.execution.gpu is not None:
            # As a job does before torch is imported.
            reduce_fragmentation()
            contexts.enter_context(own_devices(processes, lambda line: print(line, file=sys.stderr)))
        from lorabench.doctor.record import write_record
        from lorabench.doctor.run import examine

        record = examine(planned, layout, processes, _say)
        path = write_record(record)
        _table(record)
        print(f"{record.device}, {record.seconds:.0f} s; written to {path}")
    if record.failed:
        print(f"lorabench: {len(record.failed)} of {len(record.checks)} checks failed", file=sys.stderr)
        raise typer.Exit(1)


def _say(check: Check) -> None:
    """Report a check while the others are still to be made."""
    print(f"{check.status}: {check.name}", file=sys.stderr, flush=True)


def _table(record: Record) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lorabench.utils.formats import number

    colours = {"pass": "green", "fail": "bold red", "measured": "blue", "skipped": "dim"}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("check", max_width=34)
    table.add_column("result")
    table.add_column("measured", justify="right")
    table.add_column("planned", justify="right")
    table.add_column("unit", max_width=10)
    table.add_column("")
    for check in record.checks:
        numbers = ("" if value is None else number(value) for value in (check.value, check.planned))
        status = Text(check.status, style=colours[check.status])
        table.add_row(Text(check.name), status, *numbers, Text(check.unit), Text(check.sentence))
    # Without a terminal, rich would assume a width of 80 characters.
    Console(width=None if sys.stdout.isatty() else 150).print(table)
