# Some of these rules download, so they never run on a compute node.
localrules:
    eval_tasks,
    pretraining,
    evals_table,


# Every task is looked up, and its data is fetched, before the first evaluation.
rule eval_tasks:
    output:
        LAYOUT.root / "evals/tasks-{tasks}.json",
    log:
        LAYOUT.root / "logs/eval_tasks.{tasks}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "lorabench step fetch --preset {params.preset:q} 2> >(tee {log:q} >&2)"


rule pretraining:
    output:
        LAYOUT.root / "data/pretraining-{documents}.parquet",
    log:
        LAYOUT.root / "logs/pretraining.{documents}.log",
    priority: FIRST
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench step pretraining --preset {params.preset:q} 2> >(tee {log:q} >&2)"


# There is one job per base model, and one per condition at its best LR. The job that trained a run kept its weights.
rule evaluate:
    input:
        eval_inputs,
    output:
        LAYOUT.root / "evals/{evaluation}.parquet",
        LAYOUT.root / "evals/{evaluation}.samples.parquet",
    log:
        LAYOUT.root / "logs/{evaluation}.log",
    conda:
        "../envs/lorabench.yaml"
    threads: LAYOUT.preset.execution.threads
    resources:
        **requested(
            lambda wildcards: evaluation_cost(PLAN, EVALUATIONS[wildcards.evaluation])
        ),
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 exec lorabench step evaluate {wildcards.evaluation} --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"


rule evals_table:
    input:
        [LAYOUT.evals(job) for job in EVALUATIONS.values()],
    output:
        LAYOUT.tables() / "evals.parquet",
        LAYOUT.tables() / "evals.csv",
    log:
        LAYOUT.root / "logs/evals_table.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        out=LAYOUT.tables(),
    shell:
        "HF_HUB_OFFLINE=1 lorabench step collect-evals {input:q} --out {params.out:q} 2> >(tee {log:q} >&2)"
