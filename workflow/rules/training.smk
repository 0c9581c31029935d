# Times are taken in this job, so it has as many threads as a sweep.
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
        **asked(lambda wildcards: compute_resources(PLAN)),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench compute --preset {params.preset:q} 2> >(tee {log:q} >&2)"


# One job per sweep. Its finished runs and checkpoints lie outside the declared output, so a killed job
# goes on where it was.
rule sweep:
    input:
        sweep_data,
    output:
        LAYOUT.root / "sweeps/{sweep}.parquet",
    log:
        LAYOUT.root / "logs/{sweep}.log",
    priority: lambda wildcards: PRIORITIES[wildcards.sweep]
    retries: retries(sweep_resources(PLAN, sweep) for sweep in PLAN.sweeps)
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **asked(lambda wildcards: sweep_resources(PLAN, SWEEPS[wildcards.sweep])),
        # A run is trained by a process per GPU.
        processes=lambda wildcards: max(
            1, sweep_resources(PLAN, SWEEPS[wildcards.sweep]).gpus
        ),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench sweep {wildcards.sweep} --preset {params.preset:q} "
        "--log {log:q} --processes {resources.processes}"
