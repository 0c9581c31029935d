"""The plan of a preset: its sweeps, the jobs that train them, and its evaluations. No torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lorabench.config.experiments import SftExperiment
from lorabench.config.preset import Preset
from lorabench.data.identity import dataset_id
from lorabench.errors import UserError
from lorabench.models.identity import model_id
from lorabench.planning.expand import block_sweeps, merge_sweeps, rl_conditions, sft_conditions
from lorabench.planning.flops import sweep_flops
from lorabench.planning.grouping import group_sweeps
from lorabench.runs import PROTOCOL_VERSION, EvalJob, Job, Sweep
from lorabench.utils.files import digest


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

    def of(self, experiment: str) -> list[Sweep]:
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
