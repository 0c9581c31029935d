# What each job asks of a cluster. On one machine, without a profile, nothing here limits anything.
from lorabench.resources import (
    compute_resources,
    evaluation_resources,
    job_resources,
    restarts,
    tokens_resources,
)

# What a site's profile says of GPUs beside the resources that the executor knows.
SITE = {
    name: resource.raw
    for name, resource in (workflow.resource_settings.default_resources or {}).items()
}
GPU_OPTION, GPU_TYPE = SITE.get("gpu_option", "gpu"), SITE.get("gpu_type")
LONGEST = SITE.get("max_runtime")
if GPU_OPTION not in ("gpu", "gres"):
    raise WorkflowError(
        f"gpu_option = {GPU_OPTION!r} in the profile: allowed: gpu, gres"
    )

if LONGEST is not None and not (str(LONGEST).isdigit() and int(LONGEST) > 0):
    raise WorkflowError(
        f"max_runtime = {LONGEST!r} in the profile: minutes are needed, at least 1"
    )
LONGEST = LONGEST and int(LONGEST)


def in_time(minutes):
    """The minutes that a job asks for: no more than the site allows one."""
    return min(minutes, LONGEST or minutes)


def retries(jobs):
    """How often jobs that leave checkpoints start again; None is as often as the profile says.

    Where a site limits the time, that may end a job as often as it takes, beside three failures.

    Args:
        jobs: their `lorabench.resources.Resources`.
    """
    if LONGEST is None:
        return None
    return 3 + restarts(jobs, LONGEST)


def gpu_request(gpus):
    """How a job asks for GPUs, as the executor reads it; a resource that is None is left out.

    Args:
        gpus: gives the number of GPUs of a job from its wildcards, None for a CPU job.
    """
    if GPU_OPTION == "gres":
        name = f"gpu:{GPU_TYPE}" if GPU_TYPE else "gpu"
        return {
            "gres": lambda wildcards: gpus(wildcards) and f"{name}:{gpus(wildcards)}"
        }
    model = {"gpu_model": lambda wildcards: gpus(wildcards) and GPU_TYPE}
    return {"gpu": gpus} | (model if GPU_TYPE else {})


def asked(of):
    """Resources of a rule; a job that has failed asks for more memory and time.

    Args:
        of: gives the `lorabench.resources.Resources` of a job from its wildcards.
    """
    return {
        **gpu_request(lambda wildcards: of(wildcards).gpus or None),
        # Or the GPUs of one job may lie on several nodes.
        "nodes": 1,
        "cpus_per_task": lambda wildcards, threads: max(threads, of(wildcards).cpus),
        "mem_mb": lambda wildcards, attempt: of(wildcards).mem_mb * (1 + attempt) // 2,
        "runtime": lambda wildcards, attempt: in_time(of(wildcards).minutes * attempt),
        "disk_mb": lambda wildcards: of(wildcards).disk_mb,
    }
