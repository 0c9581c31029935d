localrules:
    plan,
    experiment_tables,
    tables,
    counts,
    claims,
    verdicts_by_margin,
    decide,


rule plan:
    output:
        LAYOUT.root / "plan.parquet",
    log:
        LAYOUT.root / "logs/plan.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        # The file depends only on the plan.
        jobs=job_experiments(),
    shell:
        "HF_HUB_OFFLINE=1 lorabench plan --preset {params.preset:q} --out {output:q} 2> >(tee {log:q} >&2)"


# The tables that one experiment's figures read, so that a figure trains only the runs that it needs.
rule experiment_tables:
    input:
        jobs=lambda wildcards: job_files(wildcards.experiment),
        data=lambda wildcards: grouped_data(wildcards.experiment),
    output:
        LAYOUT.tables() / "{experiment}/runs.parquet",
        LAYOUT.tables() / "{experiment}/runs.csv",
        LAYOUT.tables() / "{experiment}/curves.parquet",
        LAYOUT.tables() / "{experiment}/test_losses.parquet",
    log:
        LAYOUT.root / "logs/tables.{experiment}.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        out=lambda wildcards: LAYOUT.tables(wildcards.experiment),
        jobs=lambda wildcards: job_experiments(wildcards.experiment),
    shell:
        "HF_HUB_OFFLINE=1 lorabench step collect {input.jobs:q} --preset {params.preset:q} --out {params.out:q} "
        "2> >(tee {log:q} >&2)"


rule tables:
    input:
        jobs=job_files(),
        data=grouped_data(),
    output:
        LAYOUT.tables() / "runs.parquet",
        LAYOUT.tables() / "runs.csv",
        LAYOUT.tables() / "curves.parquet",
        LAYOUT.tables() / "test_losses.parquet",
    log:
        LAYOUT.root / "logs/tables.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        out=LAYOUT.tables(),
        jobs=job_experiments(),
    shell:
        "HF_HUB_OFFLINE=1 lorabench step collect {input.jobs:q} --preset {params.preset:q} --out {params.out:q} "
        "2> >(tee {log:q} >&2)"


# The parameters of large models are counted on their configurations, without weights or runs.
rule counts:
    output:
        LAYOUT.tables() / "counts.parquet",
        LAYOUT.tables() / "counts.csv",
    log:
        LAYOUT.root / "logs/counts.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        out=LAYOUT.tables(),
    shell:
        "HF_HUB_OFFLINE=1 lorabench step counts --out {params.out:q} 2> >(tee {log:q} >&2)"


rule claims:
    input:
        claims_tables(),
    output:
        LAYOUT.tables() / "claims.parquet",
        report(
            LAYOUT.tables() / "claims.csv",
            caption="../report/claims.rst",
            category="Claims",
            labels={"table": "claims with verdicts"},
        ),
    log:
        LAYOUT.root / "logs/claims.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        tables=LAYOUT.tables(),
        # Claims are judged again when rules, margins or predictions change, which are not in the tables.
        rules=lambda wildcards: judged_by(
            LAYOUT.preset.margins, LAYOUT.preset.predictions or {}
        ),
    shell:
        "HF_HUB_OFFLINE=1 lorabench claims --preset {params.preset:q} --tables {params.tables:q} --out {params.tables:q} "
        "2> >(tee {log:q} >&2)"


# What smaller and larger margins than the preset's would decide, for the report.
rule verdicts_by_margin:
    input:
        claims_tables(),
        claims=LAYOUT.tables() / "claims.parquet",
    output:
        LAYOUT.tables() / "verdicts_by_margin.parquet",
        LAYOUT.tables() / "verdicts_by_margin.csv",
    log:
        LAYOUT.root / "logs/verdicts_by_margin.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench step verdicts-by-margin --preset {params.preset:q} 2> >(tee {log:q} >&2)"


# The claims that the folder names, such as B2_E1, are decided batch after batch, each by a Snakemake of its own; those
# that the budget leaves open are gone on with by --force.
rule decide:
    output:
        LAYOUT.root / "batches/{claims}/index.html",
    log:
        LAYOUT.root / "logs/decide.{claims}.log",
    wildcard_constraints:
        claims="[A-Z0-9_]+",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        claims=lambda wildcards: wildcards.claims.split("_"),
        budget=config.get("budget", "1h"),
        options=config.get("options", f"--cores {workflow.cores}"),
    shell:
        "lorabench decide {params.claims} --preset {params.preset:q} --budget {params.budget:q} {params.options} "
        "2> >(tee {log:q} >&2)"
