localrules:
    report_page,


rule report_page:
    input:
        plan=LAYOUT.root / "plan.parquet",
        runs=LAYOUT.tables() / "runs.parquet",
        curves=LAYOUT.tables() / "curves.parquet",
        claims=LAYOUT.tables() / "claims.parquet",
        evals=[LAYOUT.tables() / "evals.parquet"] if EVALUATIONS else [],
        figures=expand(
            LAYOUT.figures / "{figure}.{ext}",
            figure=FIGURE_NAMES,
            ext=["svg", "png", "csv"],
        ),
    output:
        LAYOUT.report,
    log:
        LAYOUT.root / "logs/report.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        preset=PRESET,
        # What the page says of the preset beside its tables.
        about=[LAYOUT.preset.description, LAYOUT.preset.limits],
    shell:
        "lorabench report --preset {params.preset:q} "
        "2> >(tee {log:q} >&2)"
        " && echo The report is in {output:q}"
