"""Work that must end in time though what it waits for, such as a name server, has no limit of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return what a function returns, or raise what it raises; it runs in a thread that is left behind if it is late.

    Raises:
        TimeoutError: it has not ended in time.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return result.result(max(0.0, seconds))
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None
