def sweep_tokens(wildcards):
    condition = SWEEPS[wildcards.sweep].condition
    return LAYOUT.tokens(condition.model, condition.dataset)


# One job per sweep. Its finished runs and checkpoints lie outside the declared output, so a killed job
# goes on where it was.
rule sweep:
    input:
        sweep_tokens,
    output:
        LAYOUT.root / "sweeps/{sweep}.parquet",
    log:
        LAYOUT.root / "logs/{sweep}.log",
    params:
        preset=PRESET,
    threads: LAYOUT.preset.execution.threads
    shell:
        "lorabench sweep {wildcards.sweep} --preset {params.preset:q} --log {log:q}"
