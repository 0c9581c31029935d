GGUF_MODELS = {
    converted_folder(spec).name: name
    for name, spec in LAYOUT.preset.models.items()
    if isinstance(spec, GgufModel)
}


# Downloads, so never on a compute node.
localrules:
    convert_gguf,


rule convert_gguf:
    output:
        CONVERTED / "{folder}/model.safetensors",
    log:
        LAYOUT.root / "logs/convert_gguf.{folder}.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        model=lambda wildcards: GGUF_MODELS[wildcards.folder],
    shell:
        "lorabench convert {params.model:q} --preset {params.preset:q} 2> >(tee {log:q} >&2)"


# The tiny base is shipped; this builds it anew by its recipe, on request only.
rule tiny_base:
    output:
        "results/tiny_llama/model.safetensors",
        "results/tiny_llama/tokenizer.json",
        "results/tiny_llama/recipe.json",
    log:
        "results/tiny_llama/build.log",
    conda:
        "../envs/lorabench.yaml"
    threads: 2
    shell:
        "lorabench tiny results/tiny_llama 2>&1 | tee {log:q}"
