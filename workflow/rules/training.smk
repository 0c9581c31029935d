# These rules read and write small files, so they never take a compute node.
localrules:
    wave,
    collect_runs,


# This job measures times, so it has as many threads as a training job.
rule compute:
    input:
        lambda wildcards: [
            file
            for model in LAYOUT.preset.experiments.compute.models
            for file in model_files(model)
        ],
    output:
        LAYOUT.tables() / "compute.parquet",
        LAYOUT.tables() / "compute.csv",
    log:
        LAYOUT.root / "logs/compute.log",
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(lambda wildcards: compute_cost(PLAN)),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step compute --preset {params.preset:q} 2> >(tee {log:q} >&2)"


# A job trains a long sweep, or several short ones to start only once. Finished runs and checkpoints are outside the
# declared output, so a killed job resumes where it was.
rule train:
    input:
        job_data,
    output:
        LAYOUT.root / "jobs/{job}.parquet",
    log:
        LAYOUT.root / "logs/{job}.log",
    wildcard_constraints:
        job=none_of(SPLIT),
    priority: lambda wildcards: PRIORITIES[wildcards.job]
    retries: retries(COSTS[job_id] for job_id in COSTS if job_id not in SPLIT)
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(lambda wildcards: COSTS[wildcards.job]),
        # Each GPU has a training process.
        processes=lambda wildcards: max(1, COSTS[wildcards.job].gpus),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step train {wildcards.job} --preset {params.preset:q} "
        "--log {log:q} --processes {resources.processes}"


# Where all runs of a sweep would take too long for one job, each run is a job. Which runs a wave has follows from the
# losses of the waves before.
rule train_run:
    input:
        job_data,
    output:
        # The run itself is kept whatever happens to this mark.
        touch(LAYOUT.root / "waves/{job}/{wave}.{run}"),
    log:
        LAYOUT.root / "logs/{job}.{wave}.{run}.log",
    priority: lambda wildcards: PRIORITIES[wildcards.job]
    retries: retries(COSTS[job_id] for job_id in SPLIT)
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(lambda wildcards: COSTS[wildcards.job]),
        processes=lambda wildcards: max(1, COSTS[wildcards.job].gpus),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step train {wildcards.job} --run {wildcards.run} --preset {params.preset:q} "
        "--log {log:q} --processes {resources.processes}"


checkpoint wave:
    input:
        earlier_runs,
    output:
        LAYOUT.root / "waves/{job}/{wave}.json",
    log:
        LAYOUT.root / "logs/{job}.{wave}.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench step wave {wildcards.job} {wildcards.wave} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"


rule collect_runs:
    input:
        last_wave,
    output:
        LAYOUT.root / "jobs/{job}.parquet",
    log:
        LAYOUT.root / "logs/{job}.log",
    wildcard_constraints:
        job=one_of(SPLIT),
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench step collect-runs {wildcards.job} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"
