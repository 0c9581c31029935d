# What each job asks of a cluster. On one machine without a profile nothing here limits anything.
from lorabench.resources import (
    compute_resources,
    evaluation_resources,
    sweep_resources,
    tokens_resources,
)

# What a site's profile says of GPUs; nothing without a profile.
SITE = {
    name: resource.raw
    for name, resource in (workflow.resource_settings.default_resources or {}).items()
    if name in ("gpu_option", "gpu_type")
}


def asked(of):
    """Resources of a rule, as the executor reads them; None asks for nothing.

    Args:
        of: gives a job's `lorabench.resources.Resources` from its wildcards.

    A job that has failed asks for more memory and time.
    """
    kind = SITE.get("gpu_type")
    as_gres = SITE.get("gpu_option") == "gres"

    def gpu(wildcards):
        return None if as_gres else of(wildcards).gpus or None

    def gpu_model(wildcards):
        return kind if gpu(wildcards) else None

    def gres(wildcards):
        gpus = of(wildcards).gpus
        parts = ["gpu", kind, str(gpus)] if kind else ["gpu", str(gpus)]
        return ":".join(parts) if as_gres and gpus else None

    return {
        "gpu": gpu,
        "gpu_model": gpu_model,
        "gres": gres,
        # Or the GPUs of one job may lie on several nodes.
        "nodes": 1,
        "cpus_per_task": lambda wildcards: of(wildcards).cpus,
        "mem_mb": lambda wildcards, attempt: of(wildcards).mem_mb * (1 + attempt) // 2,
        "runtime": lambda wildcards, attempt: of(wildcards).minutes * attempt,
        "disk_mb": lambda wildcards: of(wildcards).disk_mb,
    }
