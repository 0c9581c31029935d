localrules:
    figure,


def figure_tables(wildcards):
    folder = LAYOUT.tables(FIGURES[wildcards.figure].experiment)
    return [folder / "runs.parquet", folder / "curves.parquet"]


rule figure:
    input:
        figure_tables,
    output:
        report(
            LAYOUT.figures / "{figure}.svg",
            caption="../report/{figure}.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        LAYOUT.figures / "{figure}.png",
        LAYOUT.figures / "{figure}.csv",
    log:
        LAYOUT.root / "logs/{figure}.log",
    params:
        tables=lambda wildcards, input: Path(input[0]).parent,
        out=LAYOUT.figures,
    shell:
        "lorabench figure {wildcards.figure} --tables {params.tables:q} --out {params.out:q} " + LOGGED
