"""Signals that ask a job to end: SIGTERM (Slurm's time limit, preemption, `kill`) and SIGINT (Ctrl-C).

Training ends after the step at hand: its loop reads `requested` after each step, writes a checkpoint, and calls
`end`. A second signal does not wait. Whatever else a command does it ends at once, by an exception, so that no
half-written file is left. Several processes that train one run must agree before they call `end`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked: int | None = None


# Like KeyboardInterrupt no Exception: code that goes on after any error must not go on after this.
class Stopped(BaseException):
    """The command was asked to end by a signal, and its files are in order."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; what was done is kept, the same command goes on from there")
        self.exit_status = 128 + number


def requested() -> bool:
    """Whether training shall end after the step at hand."""
    return _asked is not None


def check() -> None:
    """Raise Stopped if that was asked for; to be called where nothing is lost by it."""
    if requested():
        end()


def end() -> NoReturn:
    """Raise Stopped, also where another process of the job was asked."""
    raise Stopped(_asked or signal.SIGTERM)


@contextmanager
def at_once() -> Iterator[None]:
    """Within, a signal raises Stopped wherever the command is."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(end):
        yield


@contextmanager
def after_this_step() -> Iterator[None]:
    """Within, the first signal is kept for `requested` and `check`; the next finds what was there before."""
    global _asked

    def ask(number: int, frame: FrameType | None) -> None:
        global _asked
        _asked = number
        _restore(before)

    with _handled(ask) as before:
        try:
            yield
        finally:
            _asked = None


Handlers = dict[signal.Signals, Any]


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[Handlers]:
    # A shell's job in the background is started deaf to Ctrl-C, and shall stay so.
    before = {number: old for number in _SIGNALS if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        _restore(before)


def _restore(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
