"""The command line `lorabench`: commands for people, and under `lorabench step` those that the rules call.

Each can be run by hand. A command imports what it needs when it runs, so that the help and a plan appear at once.
"""

from __future__ import annotations

import signal
import sys

from lorabench.cli.forks import run_in_fork
from lorabench.utils.signals import HANDLED


def app() -> None:
    """Run the command that this process was given, in a fork of the workflow's server if there is one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    status = run_in_fork()
    if status is not None:
        sys.exit(status)
    from lorabench.cli.commands import app as commands

    commands()
