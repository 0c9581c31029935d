# Published runs of others are judged by the same claims. They need no preset and no training: `snakemake evidence`.
localrules:
    evidence,


SOURCE_FILES = sorted(path for path in REFERENCE.glob("*/*") if path.is_file())
PRESET_FILES = sorted(Path("paper_figures/published").glob("*/provenance.json"))


rule evidence:
    input:
        [str(path) for path in SOURCE_FILES],
        # Each published preset is a column of the matrix.
        [path.with_name("claims.csv") for path in PRESET_FILES],
    output:
        "results/evidence/claims.csv",
        "results/evidence/matrix.csv",
        "results/evidence/measurements.csv",
        "results/evidence/summary.csv",
        "results/evidence/lr_optima.csv",
        "results/evidence/matrix.svg",
        "results/evidence/forest.svg",
    log:
        "results/evidence/logs/evidence.log",
    conda:
        "../envs/lorabench.yaml"
    shell:
        "lorabench evidence --out results/evidence 2> >(tee {log:q} >&2)"
