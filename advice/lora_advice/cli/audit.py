"""The command `audit`: what configurations of other trainers would cost."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from lora_advice.errors import UserError
from lora_advice.files import write_text


def audit(
    paths: Annotated[list[str], Argument(metavar="PATH...", help="Configurations, scripts, adapters, or folders.")],
    file_format: Annotated[
        str | None, Option("--format", help="Read the files as this format, such as axolotl, in place of detecting it.")
    ] = None,
    show_all: Annotated[bool, Option("--all", help="Show all notes and all runs, also where there are many.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON; docs/audit.schema.json describes it.")] = False,
    sarif: Annotated[Path | None, Option(help="Write the findings to this file too, as SARIF for code hosts.")] = None,
    hub: Annotated[bool, Option("--hub", help="Look models up on the hub that are not known here.")] = False,
    skip_unknown: Annotated[
        bool,
        Option("--skip-unknown", help="Pass over named files that state no training run of a known format."),
    ] = False,
) -> None:
    """Say what is wrong in the configurations of other trainers, from the files alone.

    Exits with status 1 if a finding is an error, and with 2 if a file or folder that was named could not be read.
    """
    from lora_advice.audit import audit as audit_paths

    # As root, a device would be replaced.
    if sarif is not None and os.path.exists(sarif) and not os.path.isfile(sarif):
        raise UserError(f"--sarif {sarif}: it is not a file; allowed: a file, or a name that is not there yet")
    report = audit_paths(*paths, file_format=file_format, hub=hub, skip_unknown=skip_unknown)
    if sarif is not None:
        write_text(json.dumps(report.sarif(), indent=2) + "\n", sarif)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal's encoding may lack letters of names
        sys.stdout.reconfigure(errors="backslashreplace")
    if as_json:
        print(json.dumps(asdict(report), indent=2, allow_nan=False))
    else:
        for line in report.lines(show_all):
            print(line)
    named = {Path(path).as_posix() for path in paths}
    if any(missing.path in named for missing in report.not_read):
        raise typer.Exit(2)
    if report.counts["error"]:
        raise typer.Exit(1)
