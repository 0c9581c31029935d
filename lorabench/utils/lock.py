"""A lock file with a heartbeat, so that one process at a time works on the runs of a condition.

The lock is filelock's, on Unix `flock`: the kernel releases it when the process dies, also over NFS, where the server
releases a dead node's locks when their lease ends. It covers a condition and not a sweep, because a job of an earlier
plan may still be training runs that a new plan wants too.

What filelock does not do is added here. The holder writes its name into the file and updates the file's modification
time every HEARTBEAT seconds. A second process waits as long as the holder's heartbeat goes on, and then finds the runs
finished. If the holder keeps the lock but its heartbeat has stopped (a node that hangs, or one that died under NFS 3),
the second process refuses to start and names the file to delete. On a file system without locks the heartbeat alone
decides.

The age of a heartbeat is measured by the file system's clock on both sides, because the clocks of two nodes may differ
by hours.
"""

from __future__ import annotations

import errno
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabench.errors import UserError
from lorabench.utils import signals
from lorabench.utils.exhaustion import space_for

HEARTBEAT = 10.0
"""Seconds between two heartbeats of a lock's holder."""

DEAD_AFTER = 60.0
"""Seconds without a heartbeat after which a lock's holder counts as dead or hanging."""

_POLL = 1.0
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` inside the `with` block; the file is removed at its end.

    Args:
        path: the lock file; its folder is made.
        what: what the lock protects, for messages.
        say: is called with one line if this process has to wait.

    Raises:
        UserError: another process holds the lock, and its heartbeat has stopped.
        Stopped: this process was asked to end while it waited.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _acquired(path, _Waiting(path, what, say)):
        try:
            with path.open("w") as file:
                with space_for(path):
                    file.write(f"process {os.getpid()} on {platform.node()}")
                    file.flush()
                with _heartbeat(file.fileno()):
                    yield
        finally:
            path.unlink(missing_ok=True)


class _Waiting:
    """Called at each attempt while another process holds the lock; always false, as filelock's `cancel_check`."""

    def __init__(self, path: Path, what: str, say: Callable[[str], None]) -> None:
        self.path, self.what, self.say, self.announced = path, what, say, False

    def __call__(self) -> bool:
        age, holder = heartbeat_age(self.path), _holder(self.path) or "another process"
        if age is not None and not is_alive(age):
            raise UserError(
                f"{self.what} is locked by {holder}, silent for {age:.0f} s: end it, or delete {self.path} if it is "
                "gone"
            )
        if not self.announced:
            self.say(f"waits for {holder}, which is at work on {self.what}")
            self.announced = True
        signals.check()
        return False


@contextmanager
def _acquired(path: Path, waiting: Callable[[], bool]) -> Iterator[None]:
    # Imported here, since a command that only reads heartbeats would start 60 ms later.
    from filelock import UnixFileLock

    # filelock's own substitute for `flock` has no heartbeat: it would wait forever for a node that hangs.
    lock = UnixFileLock(path, fallback_to_soft=False)
    try:
        with space_for(path):
            lock.acquire(poll_interval=_POLL, cancel_check=waiting)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        while _holder(path) and is_alive(heartbeat_age(path)):
            waiting()
            time.sleep(_POLL)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _heartbeat(descriptor: int) -> Iterator[None]:
    """Update the modification time of an open file every HEARTBEAT seconds, in a thread."""
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(descriptor, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        # A file system that fails now may work again at the next heartbeat.
        with suppress(OSError):
            os.utime(descriptor)


def heartbeat_age(path: Path) -> float | None:
    """Return the seconds since the last heartbeat of a lock's holder, or None if nobody holds it.

    The number is negative if the file system's clock was set back.
    """
    try:
        last = path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - last
    except OSError:
        # This process may not write to the folder, so its own clock has to do.
        return time.time() - last


def is_alive(age: float | None) -> bool:
    """Return whether a lock's holder counts as alive, `age` seconds after its last heartbeat (None: no holder)."""
    return age is not None and abs(age) < DEAD_AFTER


def _holder(path: Path) -> str:
    """Return what the holder of a lock wrote into the file; empty if nobody holds it or nothing is written yet."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
