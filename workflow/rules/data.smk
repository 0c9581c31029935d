# This rule downloads, so it never runs on a compute node.
localrules:
    fetch_data,


rule fetch_data:
    output:
        LAYOUT.root / "hub/data/{dataset}.{dataset_id}.json",
    log:
        LAYOUT.root / "logs/fetch_data.{dataset}.{dataset_id}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=0 lorabench step fetch-data {wildcards.dataset} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"


rule dataset:
    input:
        # Times are ignored for the reason given in job_data (common.smk).
        lambda wildcards: [ancient(path) for path in fetched_data(wildcards.dataset)],
    output:
        LAYOUT.root / "data/{dataset}.{dataset_id}.parquet",
    log:
        LAYOUT.root / "logs/dataset.{dataset}.{dataset_id}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step dataset {wildcards.dataset} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"


rule tokens:
    input:
        dataset=ancient(LAYOUT.root / "data/{dataset}.{dataset_id}.parquet"),
        model=lambda wildcards: [ancient(path) for path in model_files(wildcards.model)],
    output:
        LAYOUT.root / "tokens/{model}.{model_id}.{dataset}.{dataset_id}.safetensors",
    log:
        LAYOUT.root / "logs/tokens.{model}.{model_id}.{dataset}.{dataset_id}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(
            lambda wildcards: tokens_cost(
                LAYOUT.preset, wildcards.model, wildcards.dataset
            )
        ),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step tokens {wildcards.model} {wildcards.dataset} "
        "--preset {params.preset:q} --processes {threads} 2> >(tee {log:q} >&2)"
