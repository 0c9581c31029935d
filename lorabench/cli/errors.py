"""The end of a command that fails: an error in one sentence, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lorabench.errors import UserError
from lorabench.utils import signals
from lorabench.utils.exhaustion import memory_for, space_for


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Print an error that the user can correct as one sentence, without a traceback, and exit with status 2.

    A command that a signal stops exits with 128 plus the signal's number, as shells report it.
    """
    try:
        with (
            signals.stop_immediately(),
            space_for("this command's files"),
            memory_for("this command", "give it more, or a larger machine"),
        ):
            yield
    except UserError as error:
        print(f"lorabench: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except signals.Stopped as stopped:
        print(f"lorabench: {stopped}", file=sys.stderr)
        raise typer.Exit(stopped.exit_status) from stopped
