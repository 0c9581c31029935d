# May download, so never on a compute node.
localrules:
    dataset,


rule dataset:
    output:
        LAYOUT.root / "data/{dataset}.{dataset_id}.parquet",
    log:
        LAYOUT.root / "logs/dataset.{dataset}.{dataset_id}.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "lorabench dataset {wildcards.dataset} --preset {params.preset:q} 2> >(tee {log:q} >&2)"


rule tokens:
    input:
        dataset=LAYOUT.root / "data/{dataset}.{dataset_id}.parquet",
        model=lambda wildcards: model_files(wildcards.model),
    output:
        LAYOUT.root / "tokens/{model}.{model_id}.{dataset}.{dataset_id}.safetensors",
    log:
        LAYOUT.root / "logs/tokens.{model}.{model_id}.{dataset}.{dataset_id}.log",
    conda:
        "../envs/lorabench.yaml"
    resources:
        **asked(
            lambda wildcards: tokens_resources(
                LAYOUT.preset, wildcards.model, wildcards.dataset
            )
        ),
    params:
        preset=PRESET,
    shell:
        "lorabench tokens {wildcards.model} {wildcards.dataset} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"
