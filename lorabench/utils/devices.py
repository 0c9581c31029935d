"""GPUs of this machine for jobs that no scheduler gives any: each job takes devices that no other job holds.

A lock file per device in the machine's temporary folder is held by `flock` while a job runs; the kernel releases it
when the process dies. Does not import torch, which reads CUDA_VISIBLE_DEVICES when it is first used.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lorabench.errors import UserError

_POLL = 0.5
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def visible_devices() -> list[str]:
    """Return the GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes: numbers or UUIDs.

    They are those of CUDA_VISIBLE_DEVICES, or all that `nvidia-smi` lists; none where it is not installed.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # CUDA ignores all names after one that is not valid; users write -1 for no GPU.
        end = next((place for place, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:end]
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []


@contextmanager
def own_devices(count: int, say: Callable[[str], None]) -> Iterator[None]:
    """Within the context, CUDA_VISIBLE_DEVICES names `count` GPUs that no other job on this machine holds.

    Nothing changes where no GPU is visible, and where Slurm has assigned a job its GPUs.

    Args:
        say: is called with one line if this process has to wait for other jobs.

    Raises:
        UserError: fewer GPUs are visible.
    """
    devices, slurm_job = visible_devices(), os.environ.get("SLURM_JOB_ID")
    if not devices or (slurm_job and len(devices) <= count):
        yield
        return
    if len(devices) < count:
        raise UserError(f"this job needs {count} GPUs; this machine shows {len(devices)} ({', '.join(devices)})")
    # Within each allocation of Slurm, devices may be numbered from 0.
    scope = f"{os.getuid()}-{slurm_job}" if slurm_job else str(os.getuid())
    folder = Path(tempfile.gettempdir()) / f"lorabench-gpus-{scope}"
    folder.mkdir(exist_ok=True)
    with ExitStack() as locks:
        if len(held := _lock_devices(folder, devices, count, locks)) < count:
            say(f"waits for {count} of the GPUs {', '.join(devices)}, which other jobs hold")
        while len(held) < count:
            # Two jobs that each hold a part of what they need would wait for each other forever.
            locks.close()
            time.sleep(_POLL)
            held = _lock_devices(folder, devices, count, locks)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
        yield


def _lock_devices(folder: Path, devices: list[str], count: int, locks: ExitStack) -> list[str]:
    """Lock up to `count` devices that nobody holds, until `locks` is closed, and return their names."""
    held: list[str] = []
    for device in devices:
        if len(held) == count:
            break
        file = locks.enter_context((folder / f"{device}.lock").open("w"))
        # The file stays, since a job that is about to lock it would else hold a file without a name.
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(device)
    return held


def reduce_fragmentation() -> None:
    """Make torch, which is not imported yet, take a GPU's memory in segments that grow.

    Batches of many lengths and a cache that grows otherwise leave gaps between blocks that no tensor fits in.
    """
    # Versions of torch before 2.9 know only the first name; all read it first.
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
