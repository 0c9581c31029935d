"""Exhausted memory or disk space, reported in one sentence instead of a traceback; and freed memory that is kept."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabench.errors import UserError

# A full file system, a full quota, and a file larger than the process may write.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Paths and permissions are the user's; a file that is missing may be a mistake of this project's.
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR}
# safetensors gives the error number in its message only.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Messages of torch's allocators, cuBLAS, C++ and the system; on a CPU torch raises a plain RuntimeError. A thread that
# can't start had no memory for its stack. Torch's message may be cut short because no memory is left for its text.
_NO_MEMORY = (
    *("not enough memory", "allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc"),
    *("start new thread", "[enforce fail a"),
)


@contextmanager
def space_for(path: Path | str) -> Iterator[None]:
    """Turn the error of a full file system or quota into a UserError that names `path`, and that of a file that this
    user may not read or write, or of an impossible path, into one that names the file."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if isinstance(error, UserError) or number not in _NO_SPACE | _NO_ACCESS:
            raise
        if number in _NO_SPACE:
            raise UserError(
                f"no space left to write {path}; make room and give the same command again: "
                "finished runs and the last checkpoints are kept"
            ) from error
        named = getattr(error, "filename", None)
        # A temporary file would have got the name `path`; Arrow gives a file's name in the message only.
        file = path if named is None or str(named).endswith(".partial") else named
        # A folder can't be made where a file is.
        reason = "it is no folder" if number == errno.EEXIST else os.strerror(number)
        reason = reason if named or isinstance(path, Path) else str(error)
        raise UserError(f"{file} can't be read or written: {reason}") from error


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Turn the error of a full memory, of a machine or a GPU, into a UserError.

    It says `what` was computed, and gives `advice` how to need less memory.
    """
    try:
        yield
    except Exception as error:
        torch, text = sys.modules.get("torch"), str(error)
        on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
        reported = isinstance(error, RuntimeError) and any(message in text for message in _NO_MEMORY)
        if not (on_gpu or reported or isinstance(error, MemoryError) or _number(error) == errno.ENOMEM):
            raise
        where = " on the GPU" if on_gpu or "CUDA" in text else ""
        raise UserError(f"{what} is out of memory{where}: {advice}; what is finished is kept") from error


def _number(error: Exception) -> int | None:
    """Return the system's error number, which some libraries give in the message only."""
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


def keep_freed_memory() -> bool:
    """Make this process reuse freed memory, and return whether it does; False with another C library than glibc.

    By default glibc returns free memory at the end of the heap to the system, and each block above 32 MiB; the system
    then maps and clears the same pages in every training step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    # Other C libraries have no `mallopt`, or number its parameters differently.
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    # Parameters of `mallopt`, as numbered in glibc's malloc.h; older versions accept blocks of 32 MiB at most.
    trim_threshold, mmap_threshold = -1, -3
    kept = any(libc.mallopt(mmap_threshold, size) for size in (1 << 30, 32 << 20))
    return bool(kept and libc.mallopt(trim_threshold, (1 << 31) - 1))
