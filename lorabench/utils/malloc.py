"""Memory allocation of a process that computes on a CPU: freed blocks are kept for the next tensors.

By default glibc returns two kinds of memory to the system: free memory at the end of its heap, beyond twice the largest
block that was freed, and each block above 32 MiB. The system then maps and clears the same pages again in every
training step. `python -m benchmarks.allocation` measures the cost.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of `mallopt`, as numbered in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

# A larger block still returns to the system as soon as it is freed. Older versions accept 32 MiB at most.
_LARGEST_KEPT = (1 << 30, 32 << 20)
# Bytes of free memory at the heap's end that are kept at most; `mallopt` takes no larger number.
_KEPT = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Make this process reuse freed memory: blocks up to 1 GiB, and up to 2 GiB at the end of its heap.

    Returns:
        Whether the process does so from now on; False with another C library than glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    # Other C libraries have no `mallopt`, or number its parameters differently.
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = any(libc.mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST_KEPT)
    return bool(kept and libc.mallopt(_TRIM_THRESHOLD, _KEPT))
