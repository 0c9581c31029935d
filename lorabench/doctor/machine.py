"""The machine against the plan: device, libraries, memory, disk, files and locks of several processes, time limits."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorabench.doctor import second_process
from lorabench.doctor.limits import MIN_CAPABILITY, USABLE_MEMORY
from lorabench.doctor.record import Check
from lorabench.doctor.subprocesses import started, wait_until
from lorabench.doctor.verdict import at_least, decided, measured, skipped
from lorabench.errors import UserError
from lorabench.models.base import max_length, package_versions
from lorabench.models.vllm_support import check_installed, check_policy, vllm_version
from lorabench.planning.bill import total
from lorabench.planning.engine import uses_engine
from lorabench.planning.plan import Plan
from lorabench.planning.resources import MB, evaluation_resources, job_resources
from lorabench.store.layout import Layout
from lorabench.utils.gpus import GB, GPUS, is_called
from lorabench.utils.lock import locked
from lorabench.utils.slurm import partition_minutes

_SECONDS = 60.0
PROFILE = Path("slurm/config.yaml")
"""The settings of the site, in a clone."""


def check_device(gpu: str | None, device: str, memory: float | None) -> Check:
    """Compare the device that is here with the one that the preset names.

    Args:
        gpu: `execution.gpu` of the preset, None for a CPU.
        device: torch's name of the GPU, or the name of the processor.
        memory: bytes of the GPU; None if there is none.
    """
    name = "device"
    if gpu is None:
        if memory is None:
            return decided(name, True, f"the preset is for a CPU, and this is {device}")
        return decided(name, True, f"the preset is for a CPU; its jobs will use the GPU that is here, {device}")
    if memory is None:
        return decided(name, False, f"the preset names {gpu}, but torch sees no GPU on this machine, {device}")
    if not is_called(gpu, device):
        return decided(
            name,
            False,
            f"the preset names {gpu}, but this is {device}: set execution.gpu, or the estimates do not hold",
        )
    stated = GPUS[gpu].memory
    sentence = f"this is the {gpu} that the preset names ({device})"
    return at_least(name, memory / GB, USABLE_MEMORY * stated / GB, "GB", sentence)


def check_kernels(device: torch.device) -> Check:
    """Compute a product and fused attention in bf16 on the device."""
    name = "kernels"
    left = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    finite = bool((left @ left).isfinite().all())
    if device.type != "cuda":
        return decided(name, finite, "this processor computes products in bf16")
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return decided(
            name, False, f"the compute capability is {capability}; bf16 and flash attention need {MIN_CAPABILITY}"
        )
    query = torch.randn(1, 4, 128, 64, device=device, dtype=torch.bfloat16)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    return decided(
        name,
        finite and bool(attended.isfinite().all()),
        f"products in bf16 and flash attention work; the compute capability is {capability[0]}.{capability[1]}",
    )


def check_software(gpu: str | None) -> Check:
    """Report the versions of driver and libraries; torch must be built for GPUs where the preset is."""
    versions = package_versions()
    listed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    built: str | None = torch.version.cuda
    if gpu is not None and built is None:
        return decided("software", False, f"{listed}; this torch is built for CPUs only, and the preset names {gpu}")
    return decided("software", True, f"{listed}; {f'CUDA {built}, ' if built else ''}driver {_driver() or 'none'}")


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    versions = listed.stdout.split()
    return versions[0] if listed.returncode == 0 and versions else None


def check_host_memory(plan: Plan) -> Check:
    """Compare the memory of this machine with what the plan's largest job requests."""
    requested = [job_resources(plan, job).mem_mb for job in plan.jobs]
    requested += [evaluation_resources(plan, job).mem_mb for job in plan.evaluations()]
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sentence = "the memory of this machine, and what the plan requests for its largest job"
    return at_least("memory of the host", there / GB, max(requested) * MB / GB, "GB", sentence)


def check_disk(plan: Plan, folder: Path) -> Check:
    """Compare the free space of a folder's file system with what the plan keeps there."""
    bill = total(plan)
    sentence = f"the free space where {folder} lies, and what the plan keeps there and its largest job needs besides"
    needed = bill.disk + bill.working_disk
    return at_least("disk", shutil.disk_usage(folder).free / GB, needed / GB, "GB", sentence)


def check_models(layout: Layout) -> Check:
    """Read the configurations of the preset's models of the hub that were fetched, from the cache as jobs do."""
    name = "models of the hub"
    wanted = {model: file for model in layout.preset.models if (file := layout.fetched_model(model))}
    if not wanted:
        return skipped(name, "the preset has no model of the hub")
    fetched = [model for model, file in wanted.items() if file.is_file()]
    if not fetched:
        return skipped(name, f"none of the preset's {len(wanted)} models of the hub is fetched yet")
    for model in fetched:
        max_length(layout.model(model))
    return decided(name, True, f"{len(fetched)} of {len(wanted)} models are fetched, and this machine reads them")


def check_engine(plan: Plan, layout: Layout, device: torch.device) -> Check:
    """Say whether vLLM can draw from the policies of the preset's RL, as far as their models are there."""
    name = "vLLM"
    conditions = [sweep.condition for sweep in plan.sweeps if uses_engine(plan.preset, sweep.condition)]
    if not conditions:
        return skipped(name, "the project's own sampler draws, or the preset has no RL")
    check_installed()
    policies = {(one.model, one.rank, one.placement) for one in conditions}
    there = [one for one in policies if (file := layout.fetched_model(one[0])) is None or file.is_file()]
    for model, rank, placement in there:
        check_policy(layout.model(model), device, rank, placement)
    return decided(name, True, f"vLLM {vllm_version()} takes {len(there)} of the {len(policies)} policies of RL")


def check_files_and_locks(folder: Path, lock: Any = locked) -> list[Check]:
    """Exchange files with a second process, and let it wait for a lock that this process holds.

    Args:
        lock: holds a lock, with the arguments of `lorabench.utils.lock.locked`.
    """
    sent, returned = folder / second_process.SENT, folder / second_process.RETURNED
    sent.write_text("written by the first process")
    with started(
        "lorabench.doctor.second_process", str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout
        with lock(folder / second_process.LOCK, "the check of locks", print):
            seen = wait_until(lambda: returned.exists() and returned.read_text(), process, _SECONDS)
            same = seen and returned.read_text() == sent.read_text()
            first = process.stdout.readline().strip()
        output = process.communicate(timeout=_SECONDS)[0].split("\n")
    excludes = first == second_process.WAITS and second_process.HAS_LOCK in output
    told = "it waited, and took the lock when it was free" if excludes else f"it said {first!r}, then {output[0]!r}"
    return [
        decided(
            "files",
            same,
            f"a second process {'reads and writes' if same else 'does not see'} files in {folder.parent}",
        ),
        decided("locks", excludes, f"a second process asked for a lock that was held: {told}"),
    ]


def check_time_limit(plan: Plan, profile: Path = PROFILE, now: float | None = None) -> Check:
    """Compare the time that a job has here with the longest job of the plan, which may continue in further jobs."""
    limits = time_limits(profile, time.time() if now is None else now)
    name = "time limit"
    if not limits:
        return skipped(name, "no time limit is known: this is no job of Slurm, and no profile here sets max_runtime")
    longest = max(job_resources(plan, job).minutes for job in plan.jobs)
    least = min(limits, key=limits.__getitem__)
    parts = -(-longest // max(1, int(limits[least])))
    sentence = f"{least}; the plan's longest job may take {longest / 60:.1f} hours, so {parts} jobs of that length"
    return measured(name, limits[least], "minutes", sentence, float(longest))


def time_limits(profile: Path, now: float) -> dict[str, float]:
    """Return the known limits of a job's time in minutes, by a sentence that says where each comes from."""
    limits: dict[str, float] = {}
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        limits["this job of Slurm ends then"] = (int(end) - now) / 60
    partition = partition_minutes(os.environ.get("SLURM_JOB_PARTITION", ""))
    if partition is not None and math.isfinite(partition):
        limits["the partition of Slurm has this limit (sinfo)"] = partition
    minutes = _max_runtime(profile) if profile.is_file() else None
    if minutes is not None:
        limits[f"max_runtime in {profile}"] = minutes
    return limits


def _max_runtime(profile: Path) -> float | None:
    """Return the longest time of a job, in minutes, that a profile sets.

    Raises:
        UserError: the profile is not YAML.
    """
    try:
        settings = yaml.safe_load(profile.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{profile}: not valid YAML: {error}") from error
    defaults = settings.get("default-resources") if isinstance(settings, dict) else None
    minutes = defaults.get("max_runtime") if isinstance(defaults, dict) else None
    return float(minutes) if isinstance(minutes, int | float) else None
