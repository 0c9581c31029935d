# The resources that each job requests of a cluster. On one machine, without a profile, they have no effect.
from lorabench.planning.resources import (
    compute_resources,
    evaluation_resources,
    job_resources,
    restarts,
    tokens_resources,
)

# Settings of GPUs and time in a site's profile, beside the resources that the executor knows.
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
    """The minutes that a job requests, at most as many as the site allows."""
    return min(minutes, LONGEST or minutes)


def retries(jobs):
    """The number of times that jobs with checkpoints are started again; None leaves it to the profile.

    Where a site limits the time of a job, it may fail three times beside the restarts that the limit makes necessary.

    Args:
        jobs: the `lorabench.planning.resources.Resources` of the jobs.
    """
    if LONGEST is None:
        return None
    return 3 + restarts(jobs, LONGEST)


def gpu_request(gpus):
    """The resources by which a job requests GPUs of the executor, which ignores resources that are None.

    Args:
        gpus: a function from a job's wildcards to its number of GPUs, None for a CPU job.
    """
    if GPU_OPTION == "gres":
        name = f"gpu:{GPU_TYPE}" if GPU_TYPE else "gpu"
        return {
            "gres": lambda wildcards: gpus(wildcards) and f"{name}:{gpus(wildcards)}"
        }
    model = {"gpu_model": lambda wildcards: gpus(wildcards) and GPU_TYPE}
    return {"gpu": gpus} | (model if GPU_TYPE else {})


def requested(of):
    """The resources of a rule; a job that has failed requests more memory and time.

    Args:
        of: a function from a job's wildcards to its `lorabench.planning.resources.Resources`.
    """
    return {
        **gpu_request(lambda wildcards: of(wildcards).gpus or None),
        # Without this the GPUs of a job might be on several nodes.
        "nodes": 1,
        "cpus_per_task": lambda wildcards, threads: max(threads, of(wildcards).cpus),
        "mem_mb": lambda wildcards, attempt: of(wildcards).mem_mb * (1 + attempt) // 2,
        "runtime": lambda wildcards, attempt: in_time(of(wildcards).minutes * attempt),
        "disk_mb": lambda wildcards: of(wildcards).disk_mb,
    }
