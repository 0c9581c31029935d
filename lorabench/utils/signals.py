"""Signals that ask a job to end: SIGTERM (Slurm's time limit, preemption, `kill`) and SIGINT (Ctrl-C).

Training ends after the current step: its loop reads `requested` after each step, writes a checkpoint, and calls
`raise_stopped`, on which several processes that train one run must agree. Other work of a command ends at once by an
exception, so that no half-written file is left. One request may arrive several times, from Slurm, from `srun` and from
the launcher of a job's processes, so repetitions are ignored for a while, and while the process exits.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

GRACE = 3600
"""Seconds that a job has to save its state after the first SIGTERM; SIGTERM is ignored in them, SIGKILL never."""

_IGNORED = {signal.SIGTERM: GRACE, signal.SIGINT: 2}
"""Seconds after the first signal in which another one is taken for a repetition; a later one ends the job at once."""

HANDLED = tuple(_IGNORED)
"""A command blocks these signals when it starts, until it handles them: they would end it with a traceback."""

_received: tuple[int, float] | None = None
"""The first signal since the outermost context began, and its time."""


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
    raise Stopped(_received[0] if _received else signal.SIGTERM)


@contextmanager
def stop_immediately() -> Iterator[None]:
    """Within the context, a signal raises Stopped immediately; repetitions are ignored."""

    def end(number: int, frame: FrameType | None) -> None:
        if not _is_repetition(number):
            raise Stopped(number)

    with _handled(end):
        yield


@contextmanager
def stop_after_step() -> Iterator[None]:
    """Within the context, the first signal is kept for `requested`; a later one that is no repetition acts as usual."""

    def remember(number: int, frame: FrameType | None) -> None:
        first = _received is None
        if not _is_repetition(number) and not first:
            _restore(before)
            signal.raise_signal(number)

    with _handled(remember) as before:
        yield


def _is_repetition(number: int) -> bool:
    """Return whether a signal repeats an earlier one; the first signal is recorded."""
    global _received
    now = time.monotonic()
    if _received is None:
        _received = number, now
        return False
    return now - _received[1] < _IGNORED[signal.Signals(number)]


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[signal.Signals, Any]]:
    global _received
    # A shell starts background jobs with SIGINT ignored, which must stay so.
    before = {number: old for number in _IGNORED if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    outermost = not any(getattr(old, "__module__", None) == __name__ for old in before.values())
    for number in before:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    after = before
    try:
        yield before
    except Stopped:
        # The process ends now. Python gives up handlers of its own when it exits, but not that a signal is ignored.
        after = dict.fromkeys(before, signal.SIG_IGN) if outermost else before
        raise
    finally:
        _restore(after)
        if outermost:
            _received = None


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
