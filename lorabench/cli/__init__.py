"""The command line `lorabench`: commands for people, and under `lorabench step` those that the rules call.

Each can be run by hand. A command imports what it needs when it runs, so that the help and a plan appear at once.
"""

from __future__ import annotations

import signal

from lorabench.utils.signals import HANDLED


def app() -> None:
    """Run the command that this process was given."""
    # Until the command handles these signals, they wait: they would end it with a traceback while it imports.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    from lorabench.cli.commands import app as commands

    commands()
