# The resources that each job requests of a cluster. On one machine, without a profile, only the number of GPUs counts.
from snakemake.logging import logger

from lorabench.cli import forks
from lorabench.planning.costs import (
    compute_cost,
    doctor_cost,
    evaluation_cost,
    job_cost,
    tokens_cost,
)
from lorabench.utils.gpus import visible_devices
from lorabench.utils.slurm import partition_minutes

# What each training job needs, by its id.
COSTS = {job.job_id: job_cost(PLAN, job) for job in PLAN.jobs}
# Settings of GPUs and time in a site's profile, besides the resources that the executor knows.
SITE = {
    name: resource.raw
    for name, resource in (workflow.resource_settings.default_resources or {}).items()
}
# The profile of a cluster has this setting. The jobs that it submits read this file again and ask for nothing.
ON_CLUSTER, CONTROLS = "gpu_option" in SITE, workflow.is_main_process
GPU_OPTION, GPU_TYPE = SITE.get("gpu_option", "gpu"), SITE.get("gpu_type")
LONGEST, EXTRA = SITE.get("max_runtime"), SITE.get("slurm_extra", "").strip("'\"")
if GPU_OPTION not in ("gpu", "gres"):
    raise WorkflowError(
        f"gpu_option = {GPU_OPTION!r} in the profile: allowed: gpu, gres"
    )


def switch(name):
    """Whether a setting of the profile is on, as it is by default."""
    value = str(SITE.get(name, True)).lower()
    if value not in ("true", "false"):
        raise WorkflowError(f"{name} = {value!r} in the profile: allowed: true, false")
    return value == "true"


MEM_WITH_GPUS, CPUS_WITH_GPUS = switch("mem_with_gpus"), switch("cpus_with_gpus")
if LONGEST is not None and not (str(LONGEST).isdigit() and int(LONGEST) > 0):
    raise WorkflowError(
        f"max_runtime = {LONGEST!r} in the profile: minutes are needed, at least 1"
    )
LONGEST = LONGEST and int(LONGEST)
if ON_CLUSTER and CONTROLS and LONGEST is None:
    LONGEST = partition_minutes(SITE.get("slurm_partition", "").strip("'\""))
    longest_job = max(cost.minutes for cost in COSTS.values())
    if LONGEST is None and longest_job > 24 * 60:
        unknown = (
            f"a job may take {longest_job / 60:,.0f} hours, and sinfo does not say how long the partition lets a job "
            "run: set max_runtime in the profile (slurm/config.yaml), in minutes"
        )
        if not workflow.output_settings.dryrun:
            raise WorkflowError(unknown)
        logger.warning(unknown)
    LONGEST = None if LONGEST is None or LONGEST == float("inf") else int(LONGEST)


# Settings of the executor are known only now. The plugin submits an array once it has all jobs of a rule, and Snakemake
# gives it no more than `jobs` at once.
onstart:
    arrays = getattr(workflow.executor_settings, "array_jobs", None)
    if arrays:
        raise WorkflowError(
            f"slurm-array-jobs = {arrays!r}: leave this option out; jobs of a rule request different resources, which "
            "tasks of an array can't, and the plugin waits forever where a rule has more jobs than `jobs`"
        )
    # A forked process can't use a GPU that its parent has used.
    if workflow.local_exec and not (
        LAYOUT.preset.execution.gpu or visible_devices()
    ):
        forks.start()


# Without a scheduler, no more jobs start than GPUs are visible; each job then takes GPUs that no other job holds
# (lorabench/utils/gpus.py). Where there is none, each job ends with a sentence.
HERE = []
if not ON_CLUSTER and CONTROLS and LAYOUT.preset.execution.gpu is not None:
    HERE = visible_devices()
    if HERE and "gpu" not in workflow.global_resources:
        workflow.register_resource("gpu", len(HERE))


def in_time(minutes):
    """The minutes that a job requests, at most as many as the site allows."""
    return min(minutes, LONGEST or minutes)


def retries(jobs):
    """The number of times that jobs with checkpoints are started again; None leaves it to the profile.

    Where a site limits the time of a job, it may fail three times besides the restarts that the limit makes necessary.

    Args:
        jobs: the `lorabench.planning.costs.Cost` of the jobs.
    """
    # A submitted job that read a number here would start its work again by itself, within its time.
    if LONGEST is None or not CONTROLS:
        return None
    return 3 + max((job.minutes for job in jobs), default=0) // LONGEST


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


def warning_option(wildcards, attempt, cost):
    """The options of sbatch for a job, which ask Slurm to send SIGTERM early enough for the last checkpoints."""
    needed = cost(wildcards)
    if not needed.saving_seconds or "--signal" in EXTRA:
        return EXTRA or None
    # At most half of the time is left for it, since Slurm sends the signal at once where the whole time is.
    seconds = min(needed.saving_seconds, 30 * in_time(needed.minutes * attempt))
    return f"{EXTRA} --signal=TERM@{seconds}".strip()


def requested(cost):
    """The resources of a rule; a job that has failed requests more time and memory.

    Args:
        cost: a function from a job's wildcards to its `lorabench.planning.costs.Cost`.
    """

    def memory(wildcards, attempt):
        needed = cost(wildcards)
        if needed.gpus and not MEM_WITH_GPUS:
            # The executor requests no memory where it is 0.
            return 0
        # The attempts that end at the limit of time, and not for lack of memory, ask for no more.
        expected = needed.minutes // LONGEST if LONGEST else 0
        more = min(3, 1 + max(0, attempt - 1 - expected) / 2)
        return int(needed.mem_mb * more)

    def cpus(wildcards, threads):
        needed = cost(wildcards)
        # The executor requests no number of cores where it is negative.
        return max(threads, needed.cpus) if CPUS_WITH_GPUS or not needed.gpus else -1

    def gpus(wildcards):
        needed = cost(wildcards).gpus
        if HERE and needed > len(HERE):
            raise WorkflowError(
                f"a job needs {needed} GPUs, and this machine shows {len(HERE)}; lower execution.max_gpus, or leave "
                "its model out of the preset"
            )
        return needed or None

    return {
        **gpu_request(gpus),
        # Without this the GPUs of a job might be on several nodes.
        "nodes": 1,
        "cpus_per_task": cpus,
        "mem_mb": memory,
        "runtime": lambda wildcards, attempt: in_time(
            cost(wildcards).minutes * attempt
        ),
        "disk_mb": lambda wildcards: int(cost(wildcards).disk / 1e6),
        **(
            {
                "slurm_extra": lambda wildcards, attempt: warning_option(
                    wildcards, attempt, cost
                )
            }
            if ON_CLUSTER
            else {}
        ),
    }
