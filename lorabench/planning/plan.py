"""The plan of a preset: its sweeps, the jobs that train them, and its evaluations. No torch is imported.

Sweeps are grouped into jobs, so that the time to start a job is a small share of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lorabench.config.experiments import SftExperiment
from lorabench.config.preset import Preset
from lorabench.data.identity import dataset_id
from lorabench.errors import UserError
from lorabench.models.specs import model_id
from lorabench.planning.expand import block_sweeps, merge_sweeps, rl_conditions, sft_conditions
from lorabench.planning.flops import sweep_flops
from lorabench.planning.memory import gpus_needed
from lorabench.planning.seconds import start_seconds, sweep_seconds
from lorabench.runs import PROTOCOL_VERSION, EvalJob, Job, Sweep
from lorabench.utils.files import digest

START_SHARE = 0.05
"""Share of a job's time that its start may take."""


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
            sources = {task.source for task in evaluation.tasks if task.source}
            data = {name: dataset_id(self.preset.sources[name]) for name in sorted(sources)}
            rules = evaluation.model_dump(exclude={"experiments"})
            sampler = self.preset.execution.sampler
            named = [] if sampler == "own" else [sampler]
            identity = digest([PROTOCOL_VERSION, rules, data, model_id(self.preset.models[model]), *named], 8)
            jobs.append(EvalJob(model, None, identity))
            jobs += [EvalJob(model, sweep, identity) for sweep in chosen if sweep.condition.model == model]
        return jobs

    def evaluation(self, eval_id: str) -> EvalJob:
        """Return the evaluation with an id.

        Raises:
            UserError: the plan has no such evaluation.
        """
        for job in self.evaluations():
            if job.eval_id == eval_id:
                return job
        raise UserError(f"evaluation {eval_id!r} is not in the plan; has the preset changed since the job was made?")

    def sweeps_of(self, experiment: str) -> list[Sweep]:
        """Return the sweeps that an experiment needs."""
        return [sweep for sweep in self.sweeps if experiment in sweep.experiments]

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that train the sweeps, in the order in which they should start: the longest first.

        Raises:
            UserError: a sweep fits on no number of GPUs that the preset allows.
        """
        return tuple(Job(sweeps) for sweeps in group_sweeps(self.preset, self.sweeps))

    def jobs_of(self, experiment: str) -> list[Job]:
        """Return the jobs that train the sweeps of an experiment, and no others."""
        return [job for job in self.jobs if experiment in job.experiments]

    def job_of(self, sweep: Sweep) -> Job:
        """Return the job that trains a sweep of the plan."""
        return next(job for job in self.jobs if sweep in job.sweeps)

    def job(self, job_id: str) -> Job:
        """Return the job with an id, or a job of a single sweep by the sweep's id.

        Raises:
            UserError: the plan has no such job (the preset or the protocol version has changed).
        """
        for job in (*self.jobs, *(Job((sweep,)) for sweep in self.sweeps)):
            if job.job_id == job_id:
                return job
        raise UserError(f"job {job_id!r} is not in the plan; has the preset changed since the job was made?")

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per expected run; `lr` and `run_id` are None for runs whose LR is not known yet."""
        rows: list[dict[str, Any]] = []
        for sweep in self.sweeps:
            known = [(run.run_id, run.lr, run.seed) for run in sweep.grid()]
            unknown = [(None, None, seed) for seed in sweep.expected_seeds()]
            condition = {k: v for k, v in asdict(sweep.condition).items() if k not in {"identity", "rollouts"}}
            for run_id, lr, seed in [*known, *unknown]:
                row = {"run_id": run_id, "sweep_id": sweep.sweep_id, "experiments": list(sweep.experiments)}
                rows.append(row | condition | {"lr": lr, "seed": seed})
        return rows


def make_plan(preset: Preset) -> Plan:
    """Plan a preset's sweeps; a condition that several experiments need appears once."""
    needed = [
        sweep
        for name, blocks in preset.experiments.trained().items()
        for block in blocks
        for common in (
            sft_conditions(preset, block) if isinstance(block, SftExperiment) else rl_conditions(preset, block)
        )
        for sweep in block_sweeps(preset, name, block, common)
    ]
    longest_first = sorted(merge_sweeps(needed), key=lambda sweep: -sweep_flops(preset, sweep))
    return Plan(preset, tuple(longest_first))


def group_sweeps(preset: Preset, sweeps: Sequence[Sweep]) -> list[tuple[Sweep, ...]]:
    """Group sweeps into jobs, the longest job first and in each job the longest sweep first.

    The sweeps of a job have the same model, dataset, kind of training, number of GPUs and experiments, so that a figure
    trains no more than it needs. A job grows until its start is a small share of it, but never beyond the longest
    sweep: with any number of cores the last core then finishes no later than that sweep would make it.

    Returns:
        The sweeps of each job; every sweep is in exactly one.

    Raises:
        UserError: a sweep fits on no number of GPUs that the preset allows.
    """
    groups: dict[tuple[object, ...], list[tuple[float, Sweep]]] = defaultdict(list)
    for sweep in sweeps:
        condition, gpus = sweep.condition, gpus_needed(preset, sweep)
        seconds = sweep_seconds(preset, sweep, gpus)
        key = (condition.model, condition.dataset, condition.task, sweep.experiments, gpus)
        groups[key].append((seconds, sweep))
    longest = max((seconds for group in groups.values() for seconds, _ in group), default=0.0)
    jobs = []
    for group in groups.values():
        start = start_seconds(preset, group[0][1].condition)
        # Where even the longest sweep is shorter than a start, a job as long as a start is enough.
        enough = min(start / START_SHARE, max(start, longest))
        jobs += _divided(group, enough, max(longest, 1.5 * start))
    return [tuple(sweep for _, sweep in job) for job in sorted(jobs, key=lambda job: -_seconds(job))]


def _divided(group: Iterable[tuple[float, Sweep]], enough: float, most: float) -> list[list[tuple[float, Sweep]]]:
    """Divide timed sweeps into jobs of about `enough` seconds each and at most `most`; a longer sweep is a job by
    itself."""
    longest_first = sorted(group, key=lambda timed: -timed[0])
    alone = [[timed] for timed in longest_first if timed[0] >= enough]
    short = longest_first[len(alone) :]
    count = max(1, round(_seconds(short) / enough))
    while max(map(_seconds, jobs := _spread(short, count))) > most:
        count += 1
    return alone + [job for job in jobs if job]


def _spread(longest_first: Iterable[tuple[float, Sweep]], count: int) -> list[list[tuple[float, Sweep]]]:
    """Spread timed sweeps over `count` jobs, each sweep into the job that is the shortest so far."""
    jobs: list[list[tuple[float, Sweep]]] = [[] for _ in range(count)]
    for timed in longest_first:
        min(jobs, key=_seconds).append(timed)
    return jobs


def _seconds(job: Iterable[tuple[float, Sweep]]) -> float:
    return sum(seconds for seconds, _ in job)
