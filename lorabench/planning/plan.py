"""The plan of a preset: its experiments expanded into sweeps, one per condition, the jobs that train them, and its
evaluations. No torch is imported.

Sweeps are grouped into jobs, so that the time to start a job is a small share of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from heapq import heapreplace
from itertools import product
from typing import Any, Literal

from lorabench.config.experiments import AutoLrs, Block, Protocol, RlExperiment, SftExperiment
from lorabench.config.fields import FROM_WEIGHTS, LORA_PLUS_RATIO, METHOD_NAMES, Method, Variant
from lorabench.config.inputs import curve_examples
from lorabench.config.preset import Preset
from lorabench.data.identity import dataset_id
from lorabench.errors import UserError
from lorabench.models.specs import dimensions, model_id
from lorabench.planning.flops import sweep_flops
from lorabench.planning.seconds import gpus_used, is_split, start_seconds, sweep_seconds
from lorabench.runs import PROTOCOL_VERSION, Condition, EvalJob, Job, Lattice, Racing, Rollouts, Seeds, Sweep
from lorabench.utils.files import digest

START_SHARE = 0.05
"""Share of a job's time that its start may take."""
# Number of LRs that a sweep with `lrs: auto` starts with.
_FIRST_LRS = 3
# The paper's law for Llama models, whose constants are in `lorabench.analysis.lr_law.PUBLISHED`: LR of full fine-tuning
# at width 2000, that of LoRA over it, and the exponent of the width.
_FULLFT, _LORA_OVER_FULLFT, _WIDTH, _EXPONENT = 5e-5, 10.0, 2000.0, 0.781
# In RL tinker-cookbook takes 4e-5 and 8e-5 for LoRA on GSM8K with 8B parameters, about a quarter of the law's 2.9e-4;
# the tiny bases need as much less.
_RL_SHARE = 0.25
# A variant's method, the power of the rank by which alpha is multiplied, and the LR of B over that of A.
_VARIANTS: dict[Variant, tuple[Method, float, float]] = {
    "lora": ("lora", 0.0, 1.0),
    "rslora": ("lora", 0.5, 1.0),
    "lora_plus": ("lora", 0.0, LORA_PLUS_RATIO),
    "dora": ("dora", 0.0, 1.0),
    "pissa": ("pissa", 0.0, 1.0),
    "olora": ("olora", 0.0, 1.0),
    "qlora": ("qlora", 0.0, 1.0),
}


Timed = tuple[float, list[Sweep]]
"""The sweeps of a job, and the seconds that they take together."""


@dataclass(frozen=True)
class Plan:
    """All sweeps of a preset, the one with the most FLOPs first."""

    preset: Preset
    sweeps: tuple[Sweep, ...]

    def evaluations(self) -> list[EvalJob]:
        """Return the evaluations with lm-eval: of each base, then of the best run of each evaluated condition."""
        evaluation = self.preset.evaluation
        if evaluation is None:
            return []
        chosen = [sweep for sweep in self.sweeps if set(sweep.experiments) & set(evaluation.experiments)]
        jobs: list[EvalJob] = []
        for model in sorted({sweep.condition.model for sweep in chosen}):
            sources = sorted({task.source for task in evaluation.tasks if task.source})
            data = {name: dataset_id(self.preset.sources[name]) for name in sources}
            rules = evaluation.model_dump(exclude={"experiments"})
            sampler = [] if self.preset.execution.sampler == "own" else [self.preset.execution.sampler]
            identity = digest([PROTOCOL_VERSION, rules, data, model_id(self.preset.models[model]), *sampler], 8)
            jobs.append(EvalJob(model, None, identity))
            jobs += [EvalJob(model, sweep, identity) for sweep in chosen if sweep.condition.model == model]
        return jobs

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that train the sweeps, the longest first, and in each job the longest sweep first.

        The sweeps of a job have the same model, dataset, kind of training, number of GPUs and experiments, so that a
        figure trains no more than it needs. A job grows until its start is a small share of it, but never beyond the
        longest sweep: with any number of cores the last core then finishes no later than that sweep would make it. A
        sweep whose runs are jobs of their own stays alone. UserError says that one fits on no allowed number of GPUs.
        """
        groups: dict[tuple[object, ...], list[Timed]] = defaultdict(list)
        for sweep, gpus in self.gpus.items():
            condition, timed = sweep.condition, (sweep_seconds(self.preset, sweep, gpus, sweep.n_runs), [sweep])
            groups[condition.model, condition.dataset, condition.task, sweep.experiments, gpus].append(timed)
        longest = max((seconds for group in groups.values() for seconds, _ in group), default=0.0)
        jobs: list[Timed] = []
        for group in groups.values():
            start = start_seconds(self.preset, group[0][1][0].condition)
            # Where even the longest sweep is shorter than a start, a job as long as a start is enough.
            enough, most = min(start / START_SHARE, max(start, longest)), max(longest, 1.5 * start)
            short: list[Timed] = []
            for seconds, [sweep] in sorted(group, key=lambda timed: -timed[0]):
                is_long = seconds >= enough or is_split(self.preset, sweep, self.gpus[sweep])
                (jobs if is_long else short).append((seconds, [sweep]))
            jobs += merged(short, max(1, round(sum(seconds for seconds, _ in short) / enough)), most)
        # A job that draws takes longer to start.
        jobs.sort(key=lambda timed: -timed[0] - start_seconds(self.preset, timed[1][0].condition))
        return tuple(Job(tuple(job)) for _, job in jobs)

    def is_split(self, job: Job) -> bool:
        """Return whether each run of a job's only sweep is a job of its own (see `execution.job_hours`)."""
        sweep, *others = job.sweeps
        return not others and is_split(self.preset, sweep, self.gpus[sweep])

    @cached_property
    def gpus(self) -> dict[Sweep, int]:
        """The number of GPUs of each sweep's jobs; 0 on a CPU."""
        return {sweep: gpus_used(self.preset, sweep) for sweep in self.sweeps}

    def jobs_of(self, experiment: str) -> list[Job]:
        """Return the jobs that train the sweeps of an experiment, and no others."""
        return [job for job in self.jobs if experiment in job.experiments]

    @cached_property
    def job_of(self) -> dict[Sweep, Job]:
        """The job that trains each sweep of the plan."""
        return {sweep: job for job in self.jobs for sweep in job.sweeps}

    @cached_property
    def _by_id(self) -> dict[str, Job]:
        return {job.job_id: job for job in (*(Job((sweep,)) for sweep in self.sweeps), *self.jobs)}

    def job(self, job_id: str) -> Job:
        """Return the job with an id, or a job of a single sweep by the sweep's id; UserError if the plan has none."""
        if job_id not in self._by_id:
            raise UserError(f"job {job_id!r} is not in the plan; has the preset changed since the job was made?")
        return self._by_id[job_id]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per expected run; `lr` and `run_id` are None for runs whose LR is not known yet."""
        rows: list[dict[str, Any]] = []
        for sweep in self.sweeps:
            shared = {"sweep_id": sweep.sweep_id, "experiments": list(sweep.experiments)}
            shared |= {k: v for k, v in asdict(sweep.condition).items() if k not in {"identity", "rollouts"}}
            unknown = [(None, None, seed) for wave in sweep.expected_seeds() for seed in wave]
            runs = [*((run.run_id, run.lr, run.seed) for run in sweep.grid()), *unknown]
            rows += [{"run_id": run_id, **shared, "lr": lr, "seed": seed} for run_id, lr, seed in runs]
        return rows


def merged(jobs: Sequence[Timed], least: int, most: float) -> list[Timed]:
    """Merge jobs, in their order, into `least` longer ones or more, each into the one that is shortest so far.

    There are as many as it takes for none to last longer than `most` seconds, or as there were.
    """

    def into(count: int) -> list[tuple[float, int, list[Sweep]]]:
        longer: list[tuple[float, int, list[Sweep]]] = [(0.0, number, []) for number in range(count)]
        for more, sweeps in jobs:
            seconds, number, job = longer[0]
            job += sweeps
            heapreplace(longer, (seconds + more, number, job))
        return longer

    # The longest of more jobs is never longer, so the least number that is enough is found by bisection.
    count = least + bisect_left(range(least, len(jobs)), True, key=lambda count: max(into(count))[0] <= most)
    return [(seconds, job) for seconds, _, job in sorted(into(count), key=lambda job: job[1]) if job]


def make_plan(preset: Preset) -> Plan:
    """Plan a preset's sweeps; a condition that several experiments need appears once."""
    trained = preset.experiments.trained().items()
    needed = [sweep for name, blocks in trained for block in blocks for sweep in _block_sweeps(preset, name, block)]
    longest_first = sorted(merge_sweeps(needed), key=lambda sweep: -sweep_flops(preset, sweep))
    return Plan(preset, tuple(longest_first))


def _block_sweeps(preset: Preset, name: str, block: SftExperiment | RlExperiment) -> Iterator[Sweep]:
    """Yield the sweep of each arm of a block of the experiment `name`, for each of its models, data and batch sizes.

    UserError says that a variant of LoRA can't be combined with the preset's model, rank or sampler.
    """
    best, around, every = block.seeds.best, block.seeds.around or block.seeds.best, block.seeds.every
    for common, (arm, grid, scale) in product(_conditions(preset, block), _arms(block, preset.protocol)):
        condition = Condition(**common, **arm, eps=preset.protocol.eps if block.eps is None else block.eps)
        sizes = dimensions(preset.models[condition.model])
        title = f"{METHOD_NAMES[condition.method]} of {condition.model}"
        if condition.rank is not None and condition.placement is not None and condition.method != "lora":
            if sizes.experts:
                raise UserError(f"{title}: a mixture of experts can only have LoRA; allowed: dense models")
            if preset.execution.sampler == "vllm" and (condition.rollouts or preset.evaluation):
                raise UserError(f"{title}: execution.sampler = vllm takes plain LoRA only; allowed: own")
            adapted = sizes.adapted(condition.placement, preset.protocol.include_unembedding)
            smallest = min(min(matrix.d_in, matrix.d_out) for matrix in adapted)
            if condition.method in FROM_WEIGHTS and condition.rank > smallest:
                raise UserError(
                    f"{title}: rank {condition.rank} is more than the smallest dimension of a layer, "
                    f"{smallest}, and the adapter starts with that many directions of each weight"
                )
        lattice = racing = None
        if isinstance(grid, AutoLrs):
            start = grid.start or starting_lr(sizes.hidden, condition.task)
            lattice = Lattice(grid.per_decade, grid.most - _FIRST_LRS, scale)
            lrs: tuple[float, ...] = lattice.around(start)
            if preset.racing is not None:
                racing = Racing(preset.racing.level, getattr(preset.racing.least, condition.task))
        else:
            lrs = tuple(lr * scale for lr in grid)
        given = tuple((lr, every) for lr in lrs) if every > 1 else ()
        seeds = Seeds(best, around if lattice else 1, given, preset.first_seed, racing)
        yield Sweep(condition, lrs, seeds, (name,), lattice)


def _conditions(preset: Preset, block: SftExperiment | RlExperiment) -> Iterator[dict[str, Any]]:
    """Yield the condition's fields that a block's arms share, for each model, dataset and batch size."""
    # What a block trains on: the fields that depend on the data, with the data's id.
    trained_on: list[tuple[dict[str, Any], str | Sequence[str | int]]] = []
    if isinstance(block, SftExperiment):
        for dataset, batch_size in product(block.datasets, block.batch_sizes):
            spec = preset.datasets[dataset]
            steps = int(spec.train * block.epochs) // batch_size
            size = {"batch_size": batch_size, "steps": min(steps, block.steps or steps)}
            # The examples of a learning curve are named only where they are not all, as before there was a choice.
            curve = curve_examples(spec)
            data: str | list[str | int] = dataset_id(spec) if curve is None else [dataset_id(spec), curve]
            trained_on.append(({"task": "sft", "dataset": dataset, **size}, data))
    else:
        same = block.model_dump(include={field.name for field in fields(Rollouts)} - {"held_out", "stop"})
        lists: dict[str, Any] = {"held_out": tuple(block.held_out), "stop": tuple(block.stop)}
        rollouts = Rollouts(**same, **lists, sampler=preset.execution.sampler)
        common = {"task": "rl", "batch_size": block.problems_per_step * block.group_size, "steps": block.steps}
        for problems in block.problems:
            ids = [dataset_id(preset.problems[name]) for name in (problems, *block.held_out)]
            trained_on.append(({**common, "dataset": problems, "rollouts": rollouts}, ids))
    # Alpha and epsilon are fields of the condition. Runs keep the ids that they had before there were the last two.
    rules = preset.protocol.model_dump(exclude={"alpha", "eps"})
    for name, absent in (("probe_points", None), ("schedule", "constant")):
        if rules[name] == absent:
            del rules[name]
    for model, (data_fields, data_id) in product(block.models, trained_on):
        # The hash of what determines a run's result besides the condition's other fields, its LR and seed.
        identity = digest([PROTOCOL_VERSION, model_id(preset.models[model]), data_id, rules])
        yield {"model": model, "identity": identity, **data_fields}


def _arms(block: Block, protocol: Protocol) -> Iterator[tuple[dict[str, Any], list[float] | AutoLrs, float]]:
    """Yield the condition's fields of each arm, its LR grid, and the factor on the grid's LRs."""
    if block.lrs.fullft:
        absent = dict.fromkeys(("rank", "placement", "alpha", "init_a", "lr_ratio"))
        yield {"method": "fullft", **absent}, block.lrs.fullft, 1.0
    alphas = block.alphas or [protocol.alpha]
    # The first transform is the identity: p = q = 1.
    transforms = [[1.0, 1.0], *block.transforms]
    for placement, ranks in block.ranks.items():
        settings = product(block.variants, ranks, alphas, block.inits_a, block.lr_ratios, transforms)
        for variant, rank, alpha, init_a, ratio, (p, q) in settings:
            method, more_power, more_ratio = _VARIANTS[variant]
            arm = {
                "method": method,
                "rank": rank,
                "placement": placement,
                "alpha": alpha * rank ** (block.alpha_power + more_power) / (p * q),
                "init_a": init_a * p,
                "lr_ratio": ratio * more_ratio * q / p,
            }
            yield arm, block.lrs.lora, p


def starting_lr(hidden_size: int, task: Literal["sft", "rl"]) -> float:
    """Return the LR in the middle of the first three, the same for LoRA and full fine-tuning.

    It is the geometric mean of the LRs that the paper's law gives the two methods, so that their grids overlap. The
    exponent of Llama serves all families, since a walk of a step or two makes up for that.
    """
    law: float = _FULLFT * math.sqrt(_LORA_OVER_FULLFT) * (_WIDTH / hidden_size) ** _EXPONENT
    return law * (_RL_SHARE if task == "rl" else 1.0)


def merge_sweeps(sweeps: Iterable[Sweep]) -> list[Sweep]:
    """Merge the sweeps of each condition into one, which has the LRs, seeds and experiments of all of them.

    If some have a lattice, the merged sweep walks on the finest one, starting from the LRs of all.
    """
    merged: dict[Condition, Sweep] = {}
    for sweep in sweeps:
        other = merged.get(sweep.condition)
        if other is not None:
            lattices = [part.lattice for part in (other, sweep) if part.lattice]
            finest = max(lattices, key=lambda lattice: lattice.per_decade, default=None)
            lattice = finest and replace(finest, further=max(lattice.further for lattice in lattices))
            seeds, given = (other.seeds, sweep.seeds), dict(other.seeds.given)
            for lr, number in sweep.seeds.given:
                given[lr] = max(number, given.get(lr, 1))
            best, around = max(part.best for part in seeds), max(part.around for part in seeds)
            racing = sweep.seeds.racing or other.seeds.racing
            sweep = Sweep(
                sweep.condition,
                lrs=tuple(sorted({*other.lrs, *sweep.lrs})),
                seeds=Seeds(best, around, tuple(sorted(given.items())), sweep.seeds.first, racing),
                experiments=tuple(dict.fromkeys((*other.experiments, *sweep.experiments))),
                lattice=lattice,
            )
        merged[sweep.condition] = sweep
    return list(merged.values())
