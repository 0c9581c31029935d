"""Memory or disk space that ran out, told in one sentence instead of a library's traceback."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorabench.errors import UserError

# No space, no quota left, and a file larger than the process may write.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors gives the number in its text only.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Of torch's allocators, cuBLAS, C++ and the system; torch's RuntimeErrors have no type for it on a CPU. A thread that
# can't start had no memory for its stack; torch's own words may be cut short for want of memory to put them in.
_NO_MEMORY = (
    *("not enough memory", "allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc"),
    *("start new thread", "[enforce fail a"),
)
_ASKED = re.compile(r"allocate ([\d.]+ \w+)")


class NoSpaceError(UserError):
    """A file could not be written for lack of space."""


@contextmanager
def space_for(path: Path | str) -> Iterator[None]:
    """Raise NoSpaceError, which names `path`, where a file system or a quota is full."""
    try:
        yield
    except Exception as error:
        if _number(error) not in _NO_SPACE or isinstance(error, UserError):
            raise
        raise NoSpaceError(
            f"no space left to write {path}; make room and give the same command again: "
            "finished runs and the last checkpoints are kept"
        ) from error


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Raise UserError, which names `what` and says `advice`, where memory of the machine or the GPU runs out."""
    try:
        yield
    except Exception as error:
        if not _no_memory(error):
            raise
        asked = _ASKED.search(str(error))
        tried = f" (no {asked[1]} more)" if asked else ""
        raise UserError(f"{what} is out of memory{tried}: {advice}; what is finished is kept") from error


def _number(error: Exception) -> int | None:
    """The system's number of an error, also where a library has it in its text."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


def _no_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    said = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    return said or _number(error) == errno.ENOMEM
