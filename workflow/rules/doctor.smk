# The check of a machine runs only on request, on the machine that trains: `snakemake doctor`. Its file is named for the
# device, which is unknown here, so the rule has no output and a failed check is not repeated.
rule doctor:
    log:
        LAYOUT.root / "logs/doctor.log",
    retries: 0
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(lambda wildcards: doctor_cost(PLAN)),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench doctor --preset {params.preset:q} > >(tee {log:q}) 2>&1"
