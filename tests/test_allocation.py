"""Freed memory that a process keeps."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Page faults where, as in a step of training, many blocks are held at once, 8 MiB in all, and freed together.
FAULTS = """
import resource, sys
import numpy as np
from lorabench.allocation import keep_freed_memory
if "keep" in sys.argv:
    assert keep_freed_memory()
def step():
    return [np.ones(1 << 15) for _ in range(32)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# A block of 1.5 GiB, above what is kept, of which one page is touched.
LARGE = """
import ctypes
from lorabench.allocation import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def mapped():
    return int(open("/proc/self/statm").read().split()[0]) * 4096
before = mapped()
block = libc.malloc(3 << 29)
assert mapped() - before >= 3 << 29
libc.free(block)
print(mapped() - before)
"""

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc"
)


def told(code: str, *arguments: str) -> int:
    return int(
        subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    )


@glibc
def test_freed_blocks_are_used_again_without_new_pages():
    # 2,048 pages in each of 20 steps.
    assert told(FAULTS, "as-it-is") > 20_000
    assert told(FAULTS, "keep") < 4_000


@glibc
def test_a_block_above_the_limit_goes_back_to_the_system():
    assert told(LARGE) < 1 << 28


@pytest.mark.parametrize(("platform", "names"), [("darwin", ("mallopt",)), ("linux", ()), ("linux", ("mallopt",))])
def test_nothing_happens_without_glibc(monkeypatch, platform, names):
    from lorabench import allocation

    library = type("Library", (), {name: lambda *_: pytest.fail("mallopt was called") for name in names})()
    monkeypatch.setattr(allocation.sys, "platform", platform)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: library)
    assert allocation.keep_freed_memory() is False


@pytest.mark.parametrize(("largest", "kept"), [(1 << 31, True), (32 << 20, True), (0, False)])
def test_an_older_glibc_takes_less(monkeypatch, largest, kept):
    from lorabench import allocation

    asked = []

    class Library:
        gnu_get_libc_version = None

        def mallopt(self, what: int, value: int) -> int:
            asked.append((what, value))
            return int(what != -3 or value <= largest)

    monkeypatch.setattr(allocation.sys, "platform", "linux")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: Library())
    assert allocation.keep_freed_memory() is kept
    assert [value for what, value in asked if what == -3 and value <= largest] == [min(largest, 1 << 30)] * kept
