localrules:
    figure,


rule figure:
    input:
        figure_tables,
    output:
        report(
            LAYOUT.figures / "{figure}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        LAYOUT.figures / "{figure}.png",
        LAYOUT.figures / "{figure}.csv",
    log:
        LAYOUT.root / "logs/{figure}.log",
    conda:
        "../envs/lorabench.yaml"
    params:
        tables=lambda wildcards, input: Path(input[0]).parent,
        out=LAYOUT.figures,
        caption=lambda wildcards: FIGURES[wildcards.figure].caption,
    shell:
        "lorabench figure {wildcards.figure} --tables {params.tables:q} --out {params.out:q} "
        "2> >(tee {log:q} >&2)"
