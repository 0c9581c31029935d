"""The plan of a preset: its runs, sweeps and jobs. Planning reads no data and imports neither torch nor pandas.

A *run* is a condition with one learning rate (LR) and one seed; its `run_id` is a hash of everything that determines
its result. A *sweep* is all runs of one condition: the LR grid with the first seed, further seeds at the LRs that an
experiment names, then seeds at the LR that was best on the validation split. These last runs have no run_id before
that LR is known. A *job* trains one sweep, or several short ones (see lorabench/grouping.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

from lorabench import cost
from lorabench.config import (
    Block,
    DatasetSpec,
    FileDataset,
    FileProblems,
    GgufModel,
    HubModel,
    ModelSpec,
    PathModel,
    Preset,
    ProblemSpec,
    Protocol,
    RlExperiment,
    SftExperiment,
    TinyModel,
)
from lorabench.errors import UserError
from lorabench.grouping import grouped
from lorabench.models.chat_template import template_text
from lorabench.models.placement import Placement
from lorabench.models.tiny import shipped
from lorabench.records import file_sha256

# Part of every run's identity. Raise it when a change alters what a run computes; tests/test_protocol_version.py fails
# when that may be the case.
PROTOCOL_VERSION = 2

Method = Literal["fullft", "lora"]


def digest(value: Any, length: int = 12) -> str:
    """The first hexadecimal digits of the SHA-256 of plain data, as JSON with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Rollouts:
    """How an RL run draws its rollouts and is evaluated; see `lorabench.config.RlExperiment` for the fields."""

    group_size: int
    max_new_tokens: int
    evaluations: int
    held_out: tuple[str, ...]
    held_out_samples: int
    prompt: str | None
    stop: tuple[str, ...]
    # For the cost estimate only; it does not affect a run's result.
    mean_response_tokens: int = field(compare=False)


@dataclass(frozen=True)
class Condition:
    """What a run trains: model, data, method and hyperparameters, all but the LR and the seed.

    The names of model and dataset are the preset's; `identity` is a hash of what they stand for. In RL the dataset is
    a problem set, and the batch size counts responses (problems times group size).
    """

    task: Literal["sft", "rl"]
    model: str
    dataset: str
    method: Method
    rank: int | None
    placement: Placement | None
    alpha: float | None
    batch_size: int
    steps: int
    identity: str
    # A's initial scale in units of 1/sqrt(d_in), and B's LR over A's; both are 1 in the paper, and None for FullFT.
    init_a: float | None = None
    lr_ratio: float | None = None
    eps: float = 1e-8
    rollouts: Rollouts | None = None

    @property
    def label(self) -> str:
        """A readable name for files and progress, which is never parsed."""
        method = "fullft" if self.method == "fullft" else f"lora-r{self.rank}-{self.placement}"
        return f"{self.model}-{self.dataset}-{method}-b{self.batch_size}-s{self.steps}"

    @cached_property
    def determining(self) -> dict[str, Any]:
        """The fields that determine a run's result, for `Run.run_id`."""
        condition = {k: v for k, v in asdict(self).items() if k not in {"model", "dataset"}}
        if self.rollouts is None:
            del condition["rollouts"]
        else:
            del condition["rollouts"]["mean_response_tokens"]
        return condition


@dataclass(frozen=True)
class Run:
    """One training run. `lr` is the LR of all weights in FullFT and of A in LoRA; B has `lr` times `lr_ratio`."""

    condition: Condition
    lr: float
    seed: int

    @cached_property
    def run_id(self) -> str:
        return digest({"condition": self.condition.determining, "lr": self.lr, "seed": self.seed})


@dataclass(frozen=True)
class Sweep:
    """The runs of one condition, and the experiments that need them."""

    condition: Condition
    lrs: tuple[float, ...]
    seeds: int
    """Number of seeds at the best LR."""
    experiments: tuple[str, ...] = field(compare=False)
    repeated: tuple[tuple[float, int], ...] = ()
    """LR and seed of each further run that is trained whatever the best LR is."""

    @cached_property
    def sweep_id(self) -> str:
        return f"{self.condition.label}-{digest([[run.run_id for run in self.grid()], self.seeds], 8)}"

    @property
    def n_runs(self) -> int:
        """The largest possible number of runs; it is less if a seed at the best LR is also in `repeated`."""
        return len(self.lrs) + len(self.repeated) + self.seeds - 1

    def grid(self) -> list[Run]:
        """The runs that are known before training: the LR grid with the first seed, then `repeated`."""
        cells = [*((lr, 0) for lr in self.lrs), *self.repeated]
        return [Run(self.condition, lr, seed) for lr, seed in cells]

    def repeats(self, best_lr: float) -> list[Run]:
        """The runs of the other seeds at the best LR, without any that `repeated` already has."""
        seeds = (seed for seed in range(1, self.seeds) if (best_lr, seed) not in self.repeated)
        return [Run(self.condition, best_lr, seed) for seed in seeds]

    @cached_property
    def run_ids(self) -> frozenset[str]:
        """The run_id of every run that the sweep may have, whichever LR proves the best."""
        return frozenset(run.run_id for run in (*self.grid(), *(run for lr in self.lrs for run in self.repeats(lr))))


@dataclass(frozen=True)
class Job:
    """Sweeps that are trained in one process, one after another; they share model, dataset and experiments."""

    sweeps: tuple[Sweep, ...]

    @cached_property
    def job_id(self) -> str:
        """The job's name for files: that of its sweep where it has only one."""
        first, *others = self.sweeps
        if not others:
            return first.sweep_id
        names = sorted(sweep.sweep_id for sweep in self.sweeps)
        return f"{first.condition.model}-{first.condition.dataset}-{len(names)}-sweeps-{digest(names, 8)}"

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments that need its sweeps."""
        return self.sweeps[0].experiments

    @property
    def n_runs(self) -> int:
        """The largest possible number of runs."""
        return sum(sweep.n_runs for sweep in self.sweeps)


@dataclass(frozen=True)
class EvalJob:
    """An evaluation with lm-eval of a sweep's best run, or of a base model where `sweep` is None."""

    model: str
    sweep: Sweep | None
    identity: str = field(compare=False)
    """Hash of the tasks and of the data that they read."""

    @property
    def eval_id(self) -> str:
        """The evaluation's name for files."""
        return f"{self.sweep.sweep_id if self.sweep else self.model + '-base'}-{self.identity}"


@dataclass(frozen=True)
class Plan:
    """All sweeps of a preset, the one with the most FLOPs first."""

    preset: Preset
    sweeps: tuple[Sweep, ...]

    def evaluations(self) -> list[EvalJob]:
        """The evaluations with lm-eval: of each base, then of the best run of each condition that is evaluated."""
        evaluation = self.preset.evaluation
        if evaluation is None:
            return []
        chosen = [sweep for sweep in self.sweeps if set(sweep.experiments) & set(evaluation.experiments)]
        jobs: list[EvalJob] = []
        for model in sorted({sweep.condition.model for sweep in chosen}):
            sources = {task.source for task in evaluation.tasks if task.source}
            data = {name: dataset_id(self.preset.sources[name]) for name in sorted(sources)}
            rules = evaluation.model_dump(exclude={"experiments"})
            identity = digest([PROTOCOL_VERSION, rules, data, model_id(self.preset.models[model])], 8)
            jobs.append(EvalJob(model, None, identity))
            jobs += [EvalJob(model, sweep, identity) for sweep in chosen if sweep.condition.model == model]
        return jobs

    def evaluation(self, eval_id: str) -> EvalJob:
        """The evaluation with an id.

        Raises:
            UserError: the plan has no such evaluation.
        """
        for job in self.evaluations():
            if job.eval_id == eval_id:
                return job
        raise UserError(f"evaluation {eval_id!r} is not in the plan; has the preset changed since the job was made?")

    def of(self, experiment: str) -> list[Sweep]:
        """The sweeps that an experiment needs."""
        return [sweep for sweep in self.sweeps if experiment in sweep.experiments]

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that train the sweeps, in the order in which they should start: the longest first.

        Raises:
            UserError: a sweep fits on no number of GPUs that the preset allows.
        """
        return tuple(Job(sweeps) for sweeps in grouped(self.preset, self.sweeps))

    def jobs_of(self, experiment: str) -> list[Job]:
        """The jobs that train the sweeps of an experiment, and no others."""
        return [job for job in self.jobs if experiment in job.experiments]

    def job_of(self, sweep: Sweep) -> Job:
        """The job that trains a sweep of the plan."""
        return next(job for job in self.jobs if sweep in job.sweeps)

    def job(self, name: str) -> Job:
        """The job with an id, or a job of a single sweep by the sweep's id.

        Raises:
            UserError: the plan has no such job (the preset or the protocol version has changed).
        """
        for job in (*self.jobs, *(Job((sweep,)) for sweep in self.sweeps)):
            if job.job_id == name:
                return job
        raise UserError(f"job {name!r} is not in the plan; has the preset changed since the job was made?")

    def rows(self) -> list[dict[str, Any]]:
        """One row per planned run; `lr` and `run_id` are None for seeds at the best LR, which is not known yet."""
        rows: list[dict[str, Any]] = []
        for sweep in self.sweeps:
            grid = [(run.run_id, run.lr, run.seed) for run in sweep.grid()]
            condition = {k: v for k, v in asdict(sweep.condition).items() if k not in {"identity", "rollouts"}}
            for run_id, lr, seed in [*grid, *((None, None, seed) for seed in range(1, sweep.seeds))]:
                row = {"run_id": run_id, "sweep_id": sweep.sweep_id, "experiments": list(sweep.experiments)}
                rows.append(row | condition | {"lr": lr, "seed": seed})
        return rows


def make_plan(preset: Preset) -> Plan:
    """Plan a preset's sweeps; a condition that several experiments need appears once."""
    needed = [
        sweep
        for name, blocks in preset.experiments.trained().items()
        for block in blocks
        for common in (_sft(preset, block) if isinstance(block, SftExperiment) else _rl(preset, block))
        for sweep in _sweeps(preset, name, block, common)
    ]
    longest_first = sorted(merge_sweeps(needed), key=lambda sweep: -cost.sweep_flops(preset, sweep))
    return Plan(preset, tuple(longest_first))


def merge_sweeps(sweeps: Iterable[Sweep]) -> list[Sweep]:
    """Merge the sweeps of each condition into one, which has the LRs, seeds and experiments of all of them."""
    merged: dict[Condition, Sweep] = {}
    for sweep in sweeps:
        other = merged.get(sweep.condition)
        if other is not None:
            sweep = Sweep(
                sweep.condition,
                lrs=tuple(sorted({*other.lrs, *sweep.lrs})),
                seeds=max(other.seeds, sweep.seeds),
                experiments=tuple(dict.fromkeys((*other.experiments, *sweep.experiments))),
                repeated=tuple(sorted({*other.repeated, *sweep.repeated})),
            )
        merged[sweep.condition] = sweep
    return list(merged.values())


def _sft(preset: Preset, block: SftExperiment) -> Iterator[dict[str, Any]]:
    """Yield the condition's fields that a block's arms share, for each model, dataset and batch size."""
    for model, dataset, batch_size in product(block.models, block.datasets, block.batch_sizes):
        spec = preset.datasets[dataset]
        steps = int(spec.train * block.epochs) // batch_size
        yield {
            "task": "sft",
            "model": model,
            "dataset": dataset,
            "batch_size": batch_size,
            "steps": steps if block.steps is None else min(steps, block.steps),
            "identity": _identity(preset.models[model], dataset_id(spec), preset.protocol),
        }


def _rl(preset: Preset, block: RlExperiment) -> Iterator[dict[str, Any]]:
    """Yield the condition's fields that a block's arms share, for each model and problem set."""
    rollouts = Rollouts(
        block.group_size,
        block.max_new_tokens,
        block.evaluations,
        tuple(block.held_out),
        block.held_out_samples,
        block.prompt,
        tuple(block.stop),
        block.mean_response_tokens,
    )
    for model, problems in product(block.models, block.problems):
        sets = [dataset_id(preset.problems[name]) for name in (problems, *block.held_out)]
        yield {
            "task": "rl",
            "model": model,
            "dataset": problems,
            "batch_size": block.problems_per_step * block.group_size,
            "steps": block.steps,
            "identity": _identity(preset.models[model], sets, preset.protocol),
            "rollouts": rollouts,
        }


def _sweeps(preset: Preset, name: str, block: SftExperiment | RlExperiment, common: dict[str, Any]) -> Iterator[Sweep]:
    eps = preset.protocol.eps if block.eps is None else block.eps
    for arm, lrs in _arms(block, preset.protocol):
        every = range(1, block.seeds) if block.repeat == "every" else ()
        yield Sweep(
            Condition(**common, **arm, eps=eps),
            tuple(lrs),
            seeds=block.seeds if block.repeat == "best" else 1,
            experiments=(name,),
            repeated=tuple((lr, seed) for lr in lrs for seed in every),
        )


def _arms(block: Block, protocol: Protocol) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """Yield the condition's fields of each arm, and the arm's LR grid."""
    if block.lrs.fullft:
        absent = dict.fromkeys(("rank", "placement", "alpha", "init_a", "lr_ratio"))
        yield {"method": "fullft", **absent}, block.lrs.fullft
    alphas = block.alphas or [protocol.alpha]
    # The first transform is the identity: p = q = 1.
    transforms = [[1.0, 1.0], *block.transforms]
    for placement, ranks in block.ranks.items():
        for rank, alpha, init_a, ratio, (p, q) in product(ranks, alphas, block.inits_a, block.lr_ratios, transforms):
            arm = {
                "method": "lora",
                "rank": rank,
                "placement": placement,
                "alpha": alpha * rank**block.alpha_power / (p * q),
                "init_a": init_a * p,
                "lr_ratio": ratio * q / p,
            }
            yield arm, [lr * p for lr in block.lrs.lora]


def dataset_id(spec: DatasetSpec | ProblemSpec) -> str:
    """Hash of everything that determines the examples of a dataset, or the problems of a problem set."""
    if isinstance(spec, FileDataset | FileProblems):
        # The file's content counts, not its path.
        rules = spec.model_dump(exclude={"path", "mean_tokens"})
        path = Path(spec.path)
        return digest([PROTOCOL_VERSION, rules, _content(path, path.stat().st_size, path.stat().st_mtime_ns)], 8)
    return digest([PROTOCOL_VERSION, spec.model_dump()], 8)


@cache
def _content(path: Path, size: int, changed_ns: int) -> str:
    """The file's hash; it is computed again in this process only if the file's size or time has changed."""
    return file_sha256(path)


@cache
def model_id(spec: ModelSpec) -> str:
    """Hash of everything that determines a model's weights, tokenizer and chat template, but for their paths."""
    template = None if isinstance(spec, TinyModel) else spec.chat_template
    return weights_id(spec) if template is None else digest([weights_id(spec), template_text(template)], 8)


@cache
def weights_id(spec: ModelSpec) -> str:
    """Hash of everything that determines a model's weights and tokenizer."""
    match spec:
        case TinyModel():
            return digest(json.loads((shipped(spec.name) / "recipe.json").read_text())["weights_sha256"], 8)
        case HubModel():
            return digest([spec.id, spec.revision], 8)
        case GgufModel():
            return digest(spec.sha256, 8)
        case PathModel():
            folder = Path(spec.path)
            files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
            return digest([[path.name, path.stat().st_size, _ends_sha256(path)] for path in files], 8)


def _ends_sha256(path: Path, size: int = 1 << 20) -> str:
    """SHA-256 of a file's first and last MiB, which distinguishes trained weights without reading all of them."""
    with path.open("rb") as file:
        ends = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return hashlib.sha256(ends + file.read(size)).hexdigest()


def _identity(model: ModelSpec, data: str | list[str], protocol: Protocol) -> str:
    """Hash of everything that determines a run's result beside the other fields of its condition, its LR and seed."""
    # Alpha and epsilon are fields of the condition.
    rules = protocol.model_dump(exclude={"alpha", "eps"})
    return digest([PROTOCOL_VERSION, model_id(model), data, rules])
