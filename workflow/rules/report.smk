localrules:
    report_without_evaluation,
    report_page,


# A failed evaluation prevents the page with its scores, but not this page.
rule report_without_evaluation:
    input:
        plan=LAYOUT.root / "plan.parquet",
        runs=LAYOUT.tables() / "runs.parquet",
        curves=LAYOUT.tables() / "curves.parquet",
        claims=LAYOUT.tables() / "claims.parquet",
        by_margin=LAYOUT.tables() / "verdicts_by_margin.parquet",
        figures=figure_files(
            name for name in FIGURE_NAMES if FIGURES[name].table != "evals"
        ),
    output:
        LAYOUT.report_without_evaluation,
    log:
        LAYOUT.root / "logs/report_without_evaluation.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
    shell:
        "HF_HUB_OFFLINE=1 lorabench step report --no-evaluation --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"


rule report_page:
    input:
        rules.report_without_evaluation.input,
        evals=[LAYOUT.tables() / "evals.parquet"] if EVALUATIONS else [],
        figures=figure_files(FIGURE_NAMES),
    output:
        LAYOUT.report,
    log:
        LAYOUT.root / "logs/report.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        # The page is made again when the preset's texts change, which are not in its tables.
        about=[LAYOUT.preset.description, LAYOUT.preset.limits],
    shell:
        "HF_HUB_OFFLINE=1 lorabench step report --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"
        " && echo The report is in {output:q}"
