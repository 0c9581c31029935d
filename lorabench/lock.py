"""One process at a time works on the runs of a condition: a lock file with a heartbeat.

The lock is `flock`, which the kernel gives back when its process dies, also over NFS, where a dead node's locks go when
its lease ends. It is on the condition, not on the sweep: an earlier plan's job may still train what the new one wants.

A second process waits for as long as the first gives signs of life, then finds its runs finished. Where the first is
silent and yet holds the lock (a node that hangs, or died under NFS 3), the second refuses and says which file to
delete. On a file system without locks the heartbeat alone decides.

Ages are told by the file system's clock, on both sides: those of two nodes may differ by hours.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from lorabench.errors import UserError
from lorabench.exhausted import space_for
from lorabench.training import stop

BEAT = 10.0
"""Seconds between signs of life."""

SILENT = 60.0
"""Seconds without one after which a process counts as gone."""

_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path`; it is removed at the end.

    Args:
        what: what is locked, for messages.
        say: takes one line when this process has to wait.

    Raises:
        UserError: a process holds the lock and gives no sign of life.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waits = False
    while (file := _take(path)) is None:
        age, holder = silence(path), _holder(path)
        if age is not None and not alive(age):
            raise UserError(
                f"{what} is locked by {holder}, silent for {age:.0f} s: end it, or delete {path} if it is gone"
            )
        if not waits:
            say(f"waits for {holder}, which is at work on {what}")
            waits = True
        stop.check()
        time.sleep(1)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        path.unlink(missing_ok=True)
        file.close()


def silence(path: Path) -> float | None:
    """Seconds since the last sign of life of a lock's holder; None if nobody holds it.

    Negative if the file system's clock was set back.
    """
    try:
        last = path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - last
    except OSError:
        # A folder that is not ours to write to.
        return time.time() - last


def alive(age: float | None) -> bool:
    """Whether a lock's holder gives signs of life, the last so many seconds ago."""
    return age is not None and abs(age) < SILENT


def _take(path: Path) -> TextIO | None:
    """The locked file, this process's name in it; None if another has it."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in {errno.EWOULDBLOCK, *_NO_LOCKS}:
            raise
        taken = error.errno == errno.EWOULDBLOCK or (os.fstat(file.fileno()).st_size > 0 and alive(silence(path)))
        if taken:
            file.close()
            return None
    try:
        same = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        same = False
    if not same:
        # Removed by a holder that ended between the two calls.
        file.close()
        return _take(path)
    with space_for(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    return file


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "another process"
    except FileNotFoundError:
        return "another process"


def _beat(file: TextIO, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        # The next beat may find the file system well again.
        with suppress(OSError):
            os.utime(file.fileno())
