"""The code, machine and package versions of a run, collected in the process that trains it."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lorabench.models.base import package_versions
from lorabench.utils.files import atomic_path
from lorabench.utils.gpus import processor

_REPOSITORY = Path(__file__).parents[2]


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout


def code_state(patches: Path) -> dict[str, str | None]:
    """Return the code's git commit and, if the tree is dirty, the hash of its diff, saved in `patches/<hash>.patch`.

    Both are null for an installed wheel, even if the environment lies inside a repository of the user's own.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != _REPOSITORY.resolve():
        return {"git_sha": None, "git_dirty_patch": None}
    # Other tracked files, such as figures, do not affect a run.
    sha, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD", "--", "lorabench", "workflow", "Snakefile")
    patch = None
    if diff:
        patch = hashlib.sha256(diff.encode()).hexdigest()[:16]
        path = patches / f"{patch}.patch"
        if not path.exists():
            with atomic_path(path) as partial:
                partial.write_text(diff)
    return {"git_sha": sha.strip() if sha else None, "git_dirty_patch": patch}


def machine_state(device: torch.device) -> dict[str, Any]:
    """Return the device, the visible GPUs, the CPU's instructions and threads, the host and the package versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "device_type": device.type,
        # The GPUs of the node that a scheduler assigned to this process.
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        # The instructions of the processor that PyTorch uses, such as AVX2 or AVX512.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak memory so far, so that runs of one process report their own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Where the system does not allow this, the peak stays that of all runs so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory`, in bytes: that of the GPU, on a CPU that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
