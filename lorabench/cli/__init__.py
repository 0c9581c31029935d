"""The command line `lorabench`: commands for people, and under `lorabench step` those that the rules call.

Each can be run by hand. A command imports what it needs when it runs, so that the help and a plan appear at once.
"""

from __future__ import annotations

import gc

from lorabench.cli import steps
from lorabench.cli.commands import app

__all__ = ["app"]

# A command's imports make many objects and little garbage: collecting it less often takes a tenth off each start.
gc.set_threshold(20_000)

app.add_typer(steps.steps, name="step", hidden=True)
