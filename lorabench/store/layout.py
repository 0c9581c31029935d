"""The paths of all files of a preset. No other module knows a path, and the rules of the workflow use this one too."""

from __future__ import annotations

from pathlib import Path

from lorabench.config.inputs import HubDataset, HubModel, HubProblems, ModelSpec
from lorabench.config.loading import load_preset, preset_path, split_name
from lorabench.config.preset import Preset
from lorabench.data.identity import dataset_id
from lorabench.models.specs import model_id
from lorabench.runs import Condition, EvalJob, Job, Run
from lorabench.utils.files import digest
from lorabench.utils.hub import read_fetched


class Layout:
    """The paths of one preset's files, relative to the working directory."""

    def __init__(self, name: str, preset: Preset) -> None:
        self.name, self.preset = name, preset
        self.root = Path("results") / name
        self.figures = Path("paper_figures") / name
        """The folder of the figures that a run of the preset draws; git ignores it."""
        self.published = Path("paper_figures") / "published" / name
        """The folder of figures, claims and provenance that the repository shows."""
        self.saved_runs = Path("paper_figures") / "partial" / name
        """The folder of finished runs that the repository keeps until the preset is finished."""
        self.runs = self.root / "runs"
        self.logs = self.root / "logs"
        self.jobs = self.root / "jobs"
        self.count = self.root / "finished_runs.txt"
        """The file with the numbers of finished and planned runs that jobs report."""
        self.patches = self.root / "patches"
        """The folder of the uncommitted changes to the code that runs were made with."""
        self.pins = self.root / "pins"
        """The folder that pins each branch or tag of the hub to the commit that was fetched first."""
        self.report = self.root / "report" / "index.html"
        self.report_without_evaluation = self.report.with_name("without_evaluation.html")
        """The report page without scores of lm-eval, for a preset whose evaluation fails."""

    @classmethod
    def of(cls, preset: str) -> Layout:
        """Return the layout of a preset, given by a shipped preset's name or the path of a YAML file.

        A first seed that is given with it (see `load_preset`) is a part of the name, so that the runs with other seeds
        have folders of their own: `results/laptop@100`. UserError says that there is no such valid preset.
        """
        _, first_seed = split_name(preset)
        name = preset_path(preset).stem
        return cls(name if first_seed is None else f"{name}@{first_seed}", load_preset(preset))

    def tables(self, experiment: str | None = None) -> Path:
        """Return the folder of the tidy tables, of one experiment or of all."""
        return self.root / "tables" / experiment if experiment else self.root / "tables"

    def batches(self, claims: str) -> Path:
        """Return the folder of the verdicts on batches of the preset together, of `all` claims or of some by name."""
        return self.root / "batches" / claims

    def dataset(self, dataset: str) -> Path:
        """Return the file of a dataset or a problem set."""
        return self.root / "data" / f"{dataset}.{dataset_id(self.preset.sources[dataset])}.parquet"

    def tally(self, dataset: str) -> Path:
        """Return the file that counts the usable and the unusable rows of a user's data file."""
        return self.dataset(dataset).with_suffix(".rows.json")

    def tokens(self, model: str, dataset: str) -> Path:
        """Return the file of a dataset's tokens for a model."""
        model_key, dataset_key = model_id(self.preset.models[model]), dataset_id(self.preset.datasets[dataset])
        return self.root / "tokens" / f"{model}.{model_key}.{dataset}.{dataset_key}.safetensors"

    def fetched_model(self, model: str) -> Path | None:
        """Return the file that describes what was fetched of a model of the hub; None for other models."""
        spec = self.preset.models[model]
        if not isinstance(spec, HubModel):
            return None
        return self.root / "hub" / "models" / f"{model}.{model_id(spec)}.json"

    def fetched_data(self, dataset: str) -> Path | None:
        """Return the file on what was fetched of a dataset or problem set of the hub; None if other data are read."""
        spec = self.preset.sources[dataset]
        if not isinstance(spec, HubDataset | HubProblems):
            return None
        return self.root / "hub" / "data" / f"{dataset}.{dataset_id(spec)}.json"

    def model(self, model: str) -> ModelSpec:
        """Return a model's spec; the revision of a hub model is the commit that must have been fetched."""
        spec, fetched = self.preset.models[model], self.fetched_model(model)
        if fetched is None or not isinstance(spec, HubModel):
            return spec
        return spec.model_copy(update={"revision": read_fetched(fetched)[spec.id].commit})

    def commits(self, condition: Condition) -> dict[str, str]:
        """Return the commits of the hub's repositories that a condition reads, by id; UserError if one is lacking."""
        held_out = condition.rollouts.held_out if condition.rollouts else ()
        files = [self.fetched_model(condition.model), *map(self.fetched_data, (condition.dataset, *held_out))]
        return {name: repository.commit for file in files if file for name, repository in read_fetched(file).items()}

    def job(self, job: Job) -> Path:
        """Return the file of a job's runs."""
        return self.jobs / f"{job.job_id}.parquet"

    def wave(self, sweep_id: str, number: int) -> Path:
        """Return the file of the ids of the runs of a wave, from 2, of a sweep whose runs are jobs of their own."""
        return self.root / "waves" / sweep_id / f"{number}.json"

    def trained(self, sweep_id: str, number: int, run_id: str) -> Path:
        """Return the file that marks a run of a wave as trained, in a sweep whose runs are jobs of their own."""
        return self.root / "waves" / sweep_id / f"{number}.{run_id}"

    def lock(self, run: Run) -> Path:
        """Return the lock file of a run."""
        return self.root / "locks" / f"{run.run_id}.lock"

    def progress(self, run: Run) -> Path:
        """Return the progress file of a run, which exists while the run is trained."""
        return self.root / "progress" / f"{run.run_id}.json"

    def evals(self, job: EvalJob) -> Path:
        """Return the file of one evaluation's scores."""
        return self.root / "evals" / f"{job.eval_id}.parquet"

    def samples(self, job: EvalJob) -> Path:
        """Return the file of the model's responses to an evaluation's documents."""
        return self.root / "evals" / f"{job.eval_id}.samples.parquet"

    @property
    def eval_tasks(self) -> Path:
        """The file of the evaluation's tasks as lm-eval defines them; its name changes with the preset's tasks."""
        assert self.preset.evaluation
        tasks = [task.model_dump() for task in self.preset.evaluation.tasks]
        return self.root / "evals" / f"tasks-{digest(tasks, 8)}.json"

    @property
    def pretraining(self) -> Path:
        """The file of held-out pretraining text of the tiny bases."""
        assert self.preset.evaluation
        documents = self.preset.evaluation.pretraining_documents
        return self.root / "data" / f"pretraining-{documents}.parquet"
