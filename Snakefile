# The workflow is in workflow/Snakefile, where Snakemake's catalogue and modules look for it.
include: "workflow/Snakefile"


# Snakemake forgets the default target of a file that is included.
workflow.default_target = "all"
