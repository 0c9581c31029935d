"""Memory of a process that computes on a CPU: what tensors let go of is kept for the next ones.

glibc gives back to the system what is free at the end of its heap, beyond twice the largest block that was freed, and
each block above 32 MiB: in every step of training the system maps and clears the same pages anew.
`python -m tests.benchmarks.allocation` measures that.
"""

from __future__ import annotations

import ctypes
import sys

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

# Above it a block still goes back to the system as soon as it is freed. Older versions refuse more than 32 MiB.
_LARGEST_KEPT = (1 << 30, 32 << 20)
# Free memory at the heap's end that is kept, at most: the largest number that `mallopt` takes, 2 GiB.
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have this process use freed memory again, of blocks up to 1 GiB and of 2 GiB at most at the end of its heap.

    Returns:
        Whether that is so from now on; not with another C library than glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    # Others have a `mallopt` of other numbers, or none.
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = any(libc.mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_KEPT)
    return bool(kept and libc.mallopt(_TRIM_THRESHOLD, _KEPT))
