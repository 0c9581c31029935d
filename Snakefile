from snakemake.utils import min_version

min_version("9.3")


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/figures.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/evidence.smk"
include: "workflow/rules/doctor.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        LAYOUT.report,
        [LAYOUT.report_without_evaluation] if EVALUATIONS else [],
        expand(LAYOUT.figures / "{figure}.svg", figure=FIGURE_NAMES),
