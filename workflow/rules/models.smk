from lorabench.models.specs import SHIPPED

TINY_BASES = sorted(path.name for path in SHIPPED.iterdir())

GGUF_MODELS = {
    converted_folder(spec).name: name
    for name, spec in LAYOUT.preset.models.items()
    if isinstance(spec, GgufModel)
}


# These rules download, so they never run on a compute node.
localrules:
    convert_gguf,
    fetch_model,


rule fetch_model:
    output:
        LAYOUT.root / "hub/models/{model}.{model_id}.json",
    log:
        LAYOUT.root / "logs/fetch_model.{model}.{model_id}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=0 lorabench step fetch-model {wildcards.model} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"


rule convert_gguf:
    output:
        CONVERTED / "{folder}/model.safetensors",
    log:
        LAYOUT.root / "logs/convert_gguf.{folder}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    # Presets share the file, whose folder is named by its content. Snakemake does not compare functions of the output with
    # those of the last execution, so another preset does not convert the file again.
    params:
        preset=lambda wildcards, output: PRESET,
        model=lambda wildcards, output: GGUF_MODELS[wildcards.folder],
    shell:
        "lorabench step convert {params.model:q} --preset {params.preset:q} 2> >(tee {log:q} >&2)"


# The tiny bases are shipped. This rule builds them again by their recipes, and runs only on request.
rule tiny_bases:
    input:
        expand("results/tiny_bases/{name}/model.safetensors", name=TINY_BASES),


rule tiny_base:
    output:
        "results/tiny_bases/{name}/model.safetensors",
        "results/tiny_bases/{name}/tokenizer.json",
        "results/tiny_bases/{name}/recipe.json",
    log:
        "results/tiny_bases/{name}/build.log",
    wildcard_constraints:
        name="|".join(TINY_BASES),
    conda:
        "../envs/lorabench.yaml"
    threads: 1
    shell:
        "python workflow/scripts/tiny_bases.py {wildcards.name:q} results/tiny_bases/{wildcards.name:q} 2>&1 | tee {log:q}"
