"""Signals that ask a job to end: SIGTERM (Slurm's time limit, preemption, `kill`) and SIGINT (Ctrl-C).

Training ends after the current step: its loop reads `requested` after each step, writes a checkpoint, and calls
`raise_stopped`.
A second signal has its usual effect at once. Other work of a command ends at once by an exception, so that no
half-written file is left. Several processes that train one run must agree before they call it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_received: int | None = None

_Handlers = dict[signal.Signals, Any]


# Like KeyboardInterrupt this is no Exception: code that continues after any error must not continue after a signal.
class Stopped(BaseException):
    """Raised when a signal has asked the command to end; its files are complete."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name}; what was done is kept, the same command goes on from there")
        self.exit_status = 128 + number


def requested() -> bool:
    """Return whether a signal has asked training to end after the current step."""
    return _received is not None


def check() -> None:
    """Raise Stopped if a signal was received; to be called where no work is lost."""
    if requested():
        raise_stopped()


def raise_stopped() -> NoReturn:
    """Raise Stopped; it reports SIGTERM if only another process of the job received a signal."""
    raise Stopped(_received or signal.SIGTERM)


@contextmanager
def stop_immediately() -> Iterator[None]:
    """Within the context, a signal raises Stopped immediately."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(end):
        yield


@contextmanager
def stop_after_step() -> Iterator[None]:
    """Within the context, the first signal is kept for `requested` and `check`; the next has its usual effect."""
    global _received

    def remember(number: int, frame: FrameType | None) -> None:
        global _received
        _received = number
        _restore(before)

    with _handled(remember) as before:
        try:
            yield
        finally:
            _received = None


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[_Handlers]:
    # A shell starts background jobs with SIGINT ignored, which must stay so.
    before = {number: old for number in _SIGNALS if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield before
    finally:
        _restore(before)


def _restore(handlers: _Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
