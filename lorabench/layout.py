"""Where everything of a preset lies. The one place that knows paths; Snakemake's rules use it too."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lorabench.budget import split_budget, within
from lorabench.config import HubDataset, HubModel, HubProblems, ModelSpec, Preset, load_preset, preset_path
from lorabench.hub import read_fetched
from lorabench.plan import Condition, EvalJob, Job, Sweep, dataset_id, digest, model_id


@dataclass(frozen=True)
class Layout:
    """Paths of one preset, relative to the working directory."""

    name: str
    preset: Preset
    dropped: tuple[str, ...] = ()
    """What was left out to stay within a budget, a sentence each."""

    @classmethod
    def of(cls, preset: str) -> Layout:
        """The layout of a preset by shipped name or path, within a budget if one is named (`NAME@HOURS`).

        Raises:
            PresetError: there is no such preset, it is not valid, or nothing of it fits the budget.
        """
        preset, hours = split_budget(preset)
        name, loaded = preset_path(preset).stem, load_preset(preset)
        if hours is None:
            return cls(name, loaded)
        kept, dropped = within(loaded, hours)
        return cls(name, kept, tuple(dropped))

    @property
    def root(self) -> Path:
        return Path("results") / self.name

    @property
    def figures(self) -> Path:
        """Folder of the figures that a run of the preset draws; git ignores it."""
        return Path("paper_figures") / self.name

    @property
    def published(self) -> Path:
        """Folder of the figures, claims and provenance that the repository shows; only `lorabench publish` writes it."""
        return Path("paper_figures") / "published" / self.name

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def report(self) -> Path:
        return self.root / "report" / "index.html"

    @property
    def report_without_evaluation(self) -> Path:
        """What can be said where an evaluation fails."""
        return self.report.with_name("without_evaluation.html")

    def tables(self, experiment: str | None = None) -> Path:
        """Folder of the tidy tables: of one experiment, or of all."""
        return self.root / "tables" / experiment if experiment else self.root / "tables"

    def dataset(self, dataset: str) -> Path:
        """File of a dataset or a problem set."""
        return self.root / "data" / f"{dataset}.{dataset_id(self.preset.sources[dataset])}.parquet"

    def tally(self, dataset: str) -> Path:
        """What was found in the file of a dataset or problem set of your own: its rows, and the bad ones by reason."""
        return self.dataset(dataset).with_suffix(".rows.json")

    def tokens(self, model: str, dataset: str) -> Path:
        model_key, dataset_key = model_id(self.preset.models[model]), dataset_id(self.preset.datasets[dataset])
        return self.root / "tokens" / f"{model}.{model_key}.{dataset}.{dataset_key}.safetensors"

    @property
    def pins(self) -> Path:
        """Folder of the commits that the hub's moving revisions stand for."""
        return self.root / "pins"

    def fetched_model(self, model: str) -> Path | None:
        """What was fetched of a model of the hub; None for others."""
        spec = self.preset.models[model]
        if not isinstance(spec, HubModel):
            return None
        return self.root / "hub" / "models" / f"{model}.{model_id(spec)}.json"

    def fetched_data(self, dataset: str) -> Path | None:
        """What was fetched of a dataset or a problem set of the hub; None for others and for local copies."""
        spec = self.preset.sources[dataset]
        if not isinstance(spec, HubDataset | HubProblems) or spec.path is not None:
            return None
        return self.root / "hub" / "data" / f"{dataset}.{dataset_id(spec)}.json"

    def model(self, model: str) -> ModelSpec:
        """A model's spec, one of the hub at the commit that was fetched.

        Raises:
            UserError: it was not fetched yet.
        """
        spec, fetched = self.preset.models[model], self.fetched_model(model)
        if fetched is None or not isinstance(spec, HubModel):
            return spec
        return spec.model_copy(update={"revision": read_fetched(fetched)[spec.id].commit})

    def commits(self, condition: Condition) -> dict[str, str]:
        """The commit of all that a condition reads from the hub, by id.

        Raises:
            UserError: something was not fetched yet.
        """
        held_out = condition.rollouts.held_out if condition.rollouts else ()
        files = [self.fetched_model(condition.model), *map(self.fetched_data, (condition.dataset, *held_out))]
        return {name: one.commit for file in files if file for name, one in read_fetched(file).items()}

    def job(self, job: Job) -> Path:
        """File of the runs of a job."""
        return self.root / "jobs" / f"{job.job_id}.parquet"

    def lock(self, sweep: Sweep) -> Path:
        """Lock on the runs of a sweep's condition, which a sweep of another plan may have too."""
        return self.root / "locks" / f"{digest(asdict(sweep.condition))}.lock"

    def progress(self, sweep: Sweep) -> Path:
        return self.root / "progress" / f"{sweep.sweep_id}.json"

    def evals(self, job: EvalJob) -> Path:
        """Scores of one evaluation; its samples lie beside it."""
        return self.root / "evals" / f"{job.eval_id}.parquet"

    def samples(self, job: EvalJob) -> Path:
        """What the model answered to each document of an evaluation."""
        return self.root / "evals" / f"{job.eval_id}.samples.parquet"

    @property
    def eval_tasks(self) -> Path:
        """The evaluation's tasks, looked up; the name changes with them."""
        assert self.preset.evaluation
        tasks = [task.model_dump() for task in self.preset.evaluation.tasks]
        return self.root / "evals" / f"tasks-{digest(tasks, 8)}.json"

    @property
    def pretraining(self) -> Path:
        """Held-out pretraining text of the tiny bases."""
        assert self.preset.evaluation
        documents = self.preset.evaluation.pretraining_documents
        return self.root / "data" / f"pretraining-{documents}.parquet"
