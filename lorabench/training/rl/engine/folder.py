"""The folder through which weights are handed over: in memory, and removed however the job ends."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabench.training.distributed import Processes

_PREFIX = "lorabench-policy-"


@contextmanager
def handover_folder(processes: Processes) -> Iterator[Path]:
    """Make a folder that all processes of a job, which share a machine, see; it is removed at the end.

    It is in memory where there is such a file system. Folders that killed jobs left behind are removed first.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    owner, token = map(int, processes.gather([os.getpid(), secrets.randbelow(1 << 40)])[0])
    folder = parent / f"{_PREFIX}{owner}-{token}"
    if processes.first:
        for old in parent.glob(f"{_PREFIX}*"):
            # Another job may remove it at the same moment.
            with suppress(FileNotFoundError):
                if old.stat().st_uid == os.getuid() and not _alive(old.name.removeprefix(_PREFIX).split("-")[0]):
                    shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(mode=0o700)
    processes.wait()
    try:
        yield folder
    finally:
        if processes.first:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
