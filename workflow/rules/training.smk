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
    priority: lambda wildcards: PRIORITIES[wildcards.job]
    retries: retries(job_cost(PLAN, job) for job in PLAN.jobs)
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(lambda wildcards: job_cost(PLAN, JOBS[wildcards.job])),
        # Each GPU has a training process.
        processes=lambda wildcards: max(1, job_cost(PLAN, JOBS[wildcards.job]).gpus),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step train {wildcards.job} --preset {params.preset:q} "
        "--log {log:q} --processes {resources.processes}"
