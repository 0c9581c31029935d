from lorabench.models.base import CONVERTED, converted_folder


def model_files(model):
    """What has to be made before a model can be loaded: the safetensors of a GGUF file."""
    spec = LAYOUT.preset.models[model]
    return [converted_folder(spec) / "model.safetensors"] if isinstance(spec, GgufModel) else []


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
    params:
        preset=PRESET,
        model=lambda wildcards: GGUF_MODELS[wildcards.folder],
    shell:
        "lorabench convert {params.model:q} --preset {params.preset:q} " + LOGGED


# The tiny base is shipped; this builds it anew by its recipe, on request only.
rule tiny_base:
    output:
        "results/tiny_llama/model.safetensors",
        "results/tiny_llama/tokenizer.json",
        "results/tiny_llama/recipe.json",
    log:
        "results/tiny_llama/build.log",
    threads: 2
    shell:
        "lorabench tiny results/tiny_llama 2>&1 | tee {log:q}"
