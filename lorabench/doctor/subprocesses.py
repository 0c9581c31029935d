"""Other processes that checks start: modules of this package, and signals to all processes of a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parents[2]
POLL = 0.01


@contextmanager
def started(module: str, *arguments: str, cwd: Path | None = None, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start `python -m MODULE ARGUMENTS`; what remains of it and its children at the end of the context is killed."""
    # The process may start in another folder, from which this package would not be found where it is not installed.
    paths = [str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=cwd, env=environment, text=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in family(process.pid):
                send(pid, signal.SIGKILL)
        process.wait()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float) -> bool:
    """Wait until a condition holds; return False if the process ends or the time is over before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def family(pid: int) -> list[int]:
    """Return a process and all that it has started, by their ids."""
    children: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(descendant for child in children for descendant in family(child))]


def send(pid: int, number: int) -> None:
    """Send a signal to a process, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
