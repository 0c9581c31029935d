"""A process keeps freed memory for its next blocks."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Counts page faults of a loop that, as a training step does, holds many blocks at once (8 MiB) and frees them together.
FAULTS = """
import resource, sys
import numpy as np
from lorabench.utils.exhaustion import keep_freed_memory
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

# Frees a block of 1.5 GiB, larger than the blocks that are kept.
LARGE = """
import ctypes
from lorabench.utils.exhaustion import keep_freed_memory
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


def printed_number(code: str, *arguments: str) -> int:
    return int(
        subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    )


@glibc
def test_freed_blocks_are_used_again_without_new_pages():
    # 2,048 pages in each of 20 steps.
    assert printed_number(FAULTS, "as-it-is") > 20_000
    assert printed_number(FAULTS, "keep") < 4_000


@glibc
def test_a_block_above_the_limit_goes_back_to_the_system():
    assert printed_number(LARGE) < 1 << 28


@pytest.mark.parametrize(("platform", "names"), [("darwin", ("mallopt",)), ("linux", ()), ("linux", ("mallopt",))])
def test_nothing_happens_without_glibc(monkeypatch, platform, names):
    from lorabench.utils import exhaustion

    library = type("Library", (), {name: lambda *_: pytest.fail("mallopt was called") for name in names})()
    monkeypatch.setattr(exhaustion.sys, "platform", platform)
    monkeypatch.setattr(exhaustion.ctypes, "CDLL", lambda name: library)
    assert exhaustion.keep_freed_memory() is False


@pytest.mark.parametrize(("largest", "kept"), [(1 << 31, True), (32 << 20, True), (0, False)])
def test_an_older_glibc_takes_less(monkeypatch, largest, kept):
    from lorabench.utils import exhaustion

    calls = []

    class Library:
        gnu_get_libc_version = None

        def mallopt(self, what: int, value: int) -> int:
            calls.append((what, value))
            return int(what != -3 or value <= largest)

    monkeypatch.setattr(exhaustion.sys, "platform", "linux")
    monkeypatch.setattr(exhaustion.ctypes, "CDLL", lambda name: Library())
    assert exhaustion.keep_freed_memory() is kept
    assert [value for what, value in calls if what == -3 and value <= largest] == [min(largest, 1 << 30)] * kept
