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
        # An option for each folder, in the order of the input.
        tables=lambda wildcards, input: [
            f"--tables={folder}"
            for folder in dict.fromkeys(Path(path).parent for path in input)
        ],
        out=LAYOUT.figures,
        caption=lambda wildcards: FIGURES[wildcards.figure].caption,
        # Figures show what is fitted by the rules.
        rules=lambda wildcards: judged_by(),
    shell:
        "HF_HUB_OFFLINE=1 lorabench figure {wildcards.figure} {params.tables:q} --out {params.out:q} "
        "2> >(tee {log:q} >&2)"
