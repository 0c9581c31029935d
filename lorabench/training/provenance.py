"""What a run ran on, taken in the process that does the work."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

from lorabench.gpus import processor
from lorabench.models.base import package_versions
from lorabench.records import atomic_path

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
    """Git commit of the code and, if the tree is dirty, the hash of its diff, kept as `patches/<hash>.patch`."""
    # Regenerated figures are tracked too; they are no part of what a run is made with.
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
    """Device, the GPUs that this process may see, threads, host and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "device_type": device.type,
        # Which of the node's GPUs a scheduler gave to this process.
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": torch.get_num_threads(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
