"""A lock file, so that one process at a time trains a run.

The lock is filelock's, on Unix `flock`, which the kernel releases when the process dies, and over NFS the server when
the lease of a dead node ends. Where the file system has no `flock`, filelock takes the file's existence for the lock.
A lock covers a run and not a sweep, because several jobs may train runs of one sweep, and a job of an earlier plan may
still be training runs that a new plan wants too: a second process waits, says so once, and then finds the run finished.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabench.errors import UserError
from lorabench.utils import signals
from lorabench.utils.exhaustion import space_for

_POLL = 1.0


@contextmanager
def locked(path: Path, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file `path` inside the `with` block; the file is removed at its end.

    `say` is called with one line if this process has to wait for `what` the lock protects. UserError says that the file
    system grants no locks, Stopped that this process was asked to end while it waited.
    """
    # Imported here, since a command that takes no lock would start 60 ms later.
    from filelock import UnixFileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, announced = UnixFileLock(path), False

    def waiting() -> bool:
        """Announce the wait once and end at a signal; false, since filelock shall go on trying."""
        nonlocal announced
        if not announced:
            say(f"waits for another process, which is at work on {what}")
            announced = True
        signals.check()
        return False

    try:
        with space_for(path):
            lock.acquire(poll_interval=_POLL, cancel_check=waiting)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        raise UserError(f"the file system of {path} grants no locks ({error.strerror}); work on another one") from error
    try:
        yield
    finally:
        # Before the lock is released: a process that waits for this file then makes a new one.
        if isinstance(lock, UnixFileLock):
            path.unlink(missing_ok=True)
        lock.release()
