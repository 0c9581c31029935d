# The preset, its plan, and the paths of both. Every cluster job parses this file again, so it must stay fast.
import json
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from lorabench.claims import rules_hash
from lorabench.config.inputs import GgufModel
from lorabench.data.identity import has_groups
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES, figures_of_preset
from lorabench.models.base import CONVERTED, converted_folder
from lorabench.planning.costs import per_experiment
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.utils.files import REFERENCE, file_sha256

PRESET = config.get("preset", "laptop")
try:
    LAYOUT = Layout.of(PRESET)
    PLAN = make_plan(LAYOUT.preset)
    # This raises an error if a job fits on no GPU, before anything is computed.
    per_experiment(PLAN)
except UserError as error:
    raise WorkflowError(str(error))

JOBS = {job.job_id: job for job in PLAN.jobs}
# The sweeps whose runs are jobs of their own, by the ids of their jobs.
SPLIT = {job.job_id: job.sweeps[0] for job in PLAN.jobs if PLAN.is_split(job)}
# The longest jobs start first, so that no core waits at the end.
PRIORITIES = {job_id: -number for number, job_id in enumerate(JOBS, -len(JOBS))}
# Jobs that make their input come before all of them; otherwise the longest jobs might have to wait for it.
FIRST = len(JOBS) + 1
EVALUATIONS = {job.eval_id: job for job in PLAN.evaluations()}
EXPERIMENTS = LAYOUT.preset.experiments.chosen()
FIGURE_NAMES = [figure.name for figure in figures_of_preset(LAYOUT.preset)]


wildcard_constraints:
    dataset="[a-z0-9_-]+",
    model="[a-z0-9_-]+",
    model_id="[0-9a-f]{8}",
    dataset_id="[0-9a-f]{8}",
    tasks="[0-9a-f]{8}",
    documents="[0-9]+",
    evaluation="[a-z0-9_-]+",
    job="[^/]+",
    wave="[0-9]+",
    run="[0-9a-f]+",
    experiment="|".join(LAYOUT.preset.experiments.trained()),
    figure="|".join(FIGURE_NAMES),


def judged_by(margins=None, predictions=None):
    """The hash of the rules, and that of their mends, which it counts as the rules before them."""
    mends = Path(rules_hash.__file__).parents[1] / "report/mends.yaml"
    return [rules_hash.rules_sha256(margins, predictions), file_sha256(mends)]


def one_of(names):
    """The pattern of some names, which matches nothing if there are none."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def none_of(names):
    """The pattern of a file's name without its suffix, which is none of some names.

    Snakemake reads the whole pattern for each file, so it must not name all jobs.
    """
    return rf"(?!(?:{one_of(names)})\.)[^/]+"


def jobs_of(experiment=None):
    """The jobs that train an experiment's runs, or all jobs."""
    return PLAN.jobs_of(experiment) if experiment else PLAN.jobs


def job_files(experiment=None):
    """The files of the jobs of an experiment, or of all jobs."""
    return [LAYOUT.job(job) for job in jobs_of(experiment)]


def job_experiments(experiment=None):
    """The jobs of an experiment, or all, with their experiments.

    They are a parameter of the rules of tables, whose column `experiments` may change with the preset while the runs do
    not.
    """
    return [(job.job_id, job.experiments) for job in jobs_of(experiment)]


def grouped_data(experiment=None):
    """The datasets whose test examples come in groups, which the tables name; times are ignored as in job_data."""
    names = dict.fromkeys(
        job.sweeps[0].condition.dataset for job in jobs_of(experiment)
    )
    return [
        ancient(LAYOUT.dataset(name))
        for name in names
        if has_groups(LAYOUT.preset.sources[name])
    ]


def model_files(model):
    """The files that loading a model needs: the safetensors of a GGUF file, or the record of a fetched hub model."""
    spec, fetched = LAYOUT.preset.models[model], LAYOUT.fetched_model(model)
    if isinstance(spec, GgufModel):
        return [converted_folder(spec) / "model.safetensors"]
    return [fetched] if fetched else []


def fetched_data(dataset):
    """The record of a dataset's fetched files, which making it needs if they are on the hub."""
    fetched = LAYOUT.fetched_data(dataset)
    return [fetched] if fetched else []


def job_data(wildcards):
    """The input of a training job: tokens, or in RL the problem sets; the model's files; records of fetched data.

    The names of these files depend on their content, so their times are ignored: the clocks of nodes may differ.
    """
    if wildcards.job not in JOBS:
        raise WorkflowError(f"job {wildcards.job!r} is not in the plan")
    job = JOBS[wildcards.job]
    conditions = [sweep.condition for sweep in job.sweeps]
    # The conditions of a job share model and dataset; their held-out problem sets may differ.
    model, dataset = conditions[0].model, conditions[0].dataset
    sets = [dataset]
    if conditions[0].rollouts is None:
        reads = [LAYOUT.tokens(model, dataset)]
    else:
        sets += dict.fromkeys(
            name for condition in conditions for name in condition.rollouts.held_out
        )
        reads = [LAYOUT.dataset(name) for name in sets]
    reads += model_files(model)
    reads += [file for name in sets for file in fetched_data(name)]
    return [ancient(path) for path in reads]


def wave_runs(job_id, number):
    """The ids of the runs of a wave, from 1, of a sweep whose runs are jobs of their own."""
    if number == 1:
        return [run.run_id for run in SPLIT[job_id].grid()]
    return json.loads(
        Path(checkpoints.wave.get(job=job_id, wave=number).output[0]).read_text()
    )


def earlier_runs(wildcards):
    """The input of the list of a wave: the runs of the wave before, which were listed after those before them.

    Times are ignored for the reason given in job_data.
    """
    job_id, before = wildcards.job, int(wildcards.wave) - 1
    marks = [
        LAYOUT.trained(job_id, before, run_id) for run_id in wave_runs(job_id, before)
    ]
    lists = [LAYOUT.wave(job_id, before)] if before > 1 else []
    return [ancient(path) for path in marks + lists]


def last_wave(wildcards):
    """The list of the wave after the last one, which is empty; it is made when all runs of a sweep are trained."""
    number = 2
    while wave_runs(wildcards.job, number):
        number += 1
    return ancient(LAYOUT.wave(wildcards.job, number))


def figure_files(names):
    """The files of figures: the drawing in two formats, and its numbers."""
    kinds = ("svg", "png", "csv")
    return [LAYOUT.figures / f"{name}.{kind}" for name in names for kind in kinds]


def figure_tables(wildcards):
    """The input of a figure: the tables of its experiments, as far as the preset has them."""
    figure = FIGURES[wildcards.figure]
    return [
        folder / f"{name}.parquet"
        for folder in figure.folders(LAYOUT)
        for name in figure.shows
    ]


def eval_inputs(wildcards):
    """The input of an evaluation: the file of the job that trained its run, the tasks' data, the base's files."""
    job, evaluation = EVALUATIONS[wildcards.evaluation], LAYOUT.preset.evaluation
    sources = dict.fromkeys(task.source for task in evaluation.tasks if task.source)
    reads = [LAYOUT.dataset(source) for source in sources]
    reads += [LAYOUT.job(PLAN.job_of[job.sweep])] if job.sweep else []
    if any(task.name == "lorabench_pretraining" for task in evaluation.tasks):
        reads.append(LAYOUT.pretraining)
    reads = [LAYOUT.eval_tasks, *reads, *model_files(job.model)]
    # Times are ignored for the reason given in job_data.
    return [ancient(path) for path in reads]


def claims_tables():
    """The tables by which claims are judged."""
    names = ["runs", "curves", "test_losses", "counts"]
    measured = ["compute"] if "compute" in EXPERIMENTS else []
    return [LAYOUT.tables() / f"{name}.parquet" for name in names + measured]
