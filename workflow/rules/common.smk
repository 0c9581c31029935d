# The preset, its plan, and the paths of both. Cheap: this is parsed again by every cluster job.
from snakemake.exceptions import WorkflowError

from lorabench.config import GgufModel
from lorabench.errors import UserError
from lorabench.figures import COMPUTE, FIGURES
from lorabench.layout import Layout
from lorabench.models.base import CONVERTED, converted_folder
from lorabench.plan import make_plan

PRESET = config.get("preset", "laptop")
try:
    LAYOUT = Layout.of(PRESET)
except UserError as error:
    raise WorkflowError(str(error))

PLAN = make_plan(LAYOUT.preset)
SWEEPS = {sweep.sweep_id: sweep for sweep in PLAN.sweeps}
EXPERIMENTS = LAYOUT.preset.experiments.chosen()
# A figure is drawn where the preset has one of the experiments it shows.
FIGURE_NAMES = [
    name
    for name, figure in FIGURES.items()
    if any(experiment in EXPERIMENTS for experiment in figure.experiments)
]


wildcard_constraints:
    dataset="[a-z0-9_-]+",
    model="[a-z0-9_-]+",
    model_id="[0-9a-f]{8}",
    dataset_id="[0-9a-f]{8}",
    experiment="|".join(LAYOUT.preset.experiments.trained()),
    figure="|".join(FIGURE_NAMES),


def sweep_files(experiment=None):
    """The sweep files of an experiment, or of all."""
    wanted = PLAN.of(experiment) if experiment else PLAN.sweeps
    return [LAYOUT.sweep(sweep) for sweep in wanted]


def model_files(model):
    """What has to be made before a model can be loaded: the safetensors of a GGUF file."""
    spec = LAYOUT.preset.models[model]
    return (
        [converted_folder(spec) / "model.safetensors"]
        if isinstance(spec, GgufModel)
        else []
    )


def sweep_data(wildcards):
    """What a sweep reads: a token cache, or in RL the problem sets and the model's files."""
    condition = SWEEPS[wildcards.sweep].condition
    if condition.rollouts is None:
        return [LAYOUT.tokens(condition.model, condition.dataset)]
    sets = [condition.dataset, *condition.rollouts.held_out]
    return [LAYOUT.dataset(name) for name in sets] + model_files(condition.model)


def figure_tables(wildcards):
    """What a figure reads: the tables of those of its experiments that the preset has."""
    figure = FIGURES[wildcards.figure]
    if figure.experiments == COMPUTE:
        return [LAYOUT.tables() / "compute.parquet"]
    return [
        LAYOUT.tables(experiment) / f"{name}.parquet"
        for experiment in figure.experiments
        if experiment in EXPERIMENTS
        for name in ("runs", "curves")
    ]


def claims_tables():
    """What the claims are judged on."""
    names = ["runs", "curves", "counts"]
    measured = ["compute"] if "compute" in EXPERIMENTS else []
    return [LAYOUT.tables() / f"{name}.parquet" for name in names + measured]
