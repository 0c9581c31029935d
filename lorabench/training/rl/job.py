"""The runs of an RL sweep: those of LoRA in lanes, which share the base, sample and learn together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorabench.data.grading import Grader
from lorabench.data.tokens import template_key, tokenizer_key
from lorabench.models.base import load_tokenizer, max_length, skeleton
from lorabench.models.lanes import Stack, alone
from lorabench.models.size import Sizes
from lorabench.plan import Run
from lorabench.records import file_sha256
from lorabench.training import stop
from lorabench.training.lanes import train_alone, train_lanes
from lorabench.training.loss import check_plain_head
from lorabench.training.rl.loop import Environment, Scores, evaluate, train_rl
from lorabench.training.rl.problems import Grades, Texts
from lorabench.training.rl.sampler import Request, Response, sample
from lorabench.training.rl.serve import RlLanes, Sampler, sampling_alone
from lorabench.training.rl.together import OneVerdict, Replica, draw_together
from lorabench.training.sweep import Job, now, provenance

if TYPE_CHECKING:
    import torch


def train_runs(job: Job, runs: list[tuple[int, Run]]) -> None:
    """Train those runs that are not finished, given with their number in the sweep, and write each as it ends."""
    groups = job.together(runs)
    if not groups:
        return
    with ExitStack() as open_graders:
        environment = _environment(job, open_graders)
        work = _Work(job, environment, provenance(job) | _fingerprints(job, environment.texts))
        for group in groups:
            work.train(group)


@dataclass
class _Work:
    """The work of one job, and the base's scores once they are known."""

    job: Job
    environment: Environment
    provenance: dict[str, Any]
    base: Scores | None = None

    def train(self, runs: Mapping[str, tuple[int, Run]]) -> None:
        """Train runs in lanes, on a fresh base."""
        job, machine = self.job, self.job.machine
        if machine.processes.any(stop.requested()):
            stop.end()
        model: Any = job.load()
        check_plain_head(model)
        together = [run for _, run in runs.values()]
        lora = together[0].condition.method == "lora"
        if not machine.processes.sharded:
            self._base_scores(partial(self._sample, alone(model, "")))
        if lora:
            model = job.with_lora(model, together)
        sizes = Sizes.of(model)
        if machine.processes.sharded:
            stack, draw = self._sharded(model, together[0])
        else:
            stack = job.stacked(model, together) if lora else alone(model, together[0].run_id)
            draw = partial(self._sample, stack)
        base = self._base_scores(draw)
        started, checkpoints, protocol = now(), job.checkpoints(together), job.plan.preset.protocol
        lanes = {}
        for name, (number, run) in runs.items():
            job.announce(number, run)
            lanes[name] = train_rl(
                run,
                stack.lanes[name],
                self.environment,
                protocol,
                machine.processes,
                checkpoints,
                base,
                job.ticker(number, run),
            )
        for name, outcome in train_lanes(lanes, RlLanes(stack, draw, machine, machine.autocast(protocol))):
            job.write(runs[name][1], outcome, stack, sizes, self.provenance | {"started": started})
            checkpoints.ended(name)
            stack.drop(name)

    def _sharded(self, model: torch.nn.Module, run: Run) -> tuple[Stack, Sampler]:
        """The model of a run, spread over the processes, and what samples from it."""
        blank: Any = skeleton(self.job.layout.model(self.job.sweep.condition.model))
        adapter = run.run_id if run.condition.method == "lora" else None
        if adapter:
            blank = self.job.with_lora(blank, [run])
        machine = self.job.machine
        sharded = machine.processes.shard(model)
        replica = Replica(sharded, blank, machine.device, machine.autocast(self.job.plan.preset.protocol))
        stack = alone(sharded, run.run_id, adapter)
        return stack, lambda requests: self._sample(alone(replica.refreshed(), run.run_id), requests)

    def _sample(self, stack: Stack, requests: list[Request]) -> list[Response]:
        machine, texts = self.job.machine, self.environment.texts
        autocast = machine.autocast(self.job.plan.preset.protocol)

        def draw(share: list[Request]) -> list[Response]:
            return sample(stack, texts.tokenizer, share, texts.stop, machine.max_cache_tokens, autocast)

        return draw_together(requests, draw, machine.processes)

    def _base_scores(self, draw: Sampler) -> Scores:
        """Scores of the untouched base: once per job, from a model that has not been trained."""
        if self.base is None:
            rollouts = self.job.sweep.condition.rollouts
            assert rollouts
            asking = evaluate(self.environment, rollouts, 0, 0, None)
            self.base, _ = train_alone(asking, sampling_alone(draw))
        return self.base


def _environment(job: Job, open_graders: ExitStack) -> Environment:
    condition, preset = job.sweep.condition, job.plan.preset
    rollouts = condition.rollouts
    assert rollouts
    spec = job.layout.model(condition.model)
    texts = Texts(load_tokenizer(spec), rollouts, max_length(spec))

    def grader(name: str) -> Grades:
        workers = preset.execution.threads
        opened = open_graders.enter_context(Grader(preset.problems[name].grader, workers))
        return OneVerdict(opened, job.machine.processes)

    held_out = {name: texts.read(job.layout.dataset(name))["test"] for name in rollouts.held_out}
    return Environment(
        texts,
        texts.read(job.layout.dataset(condition.dataset)),
        held_out,
        grader(condition.dataset),
        {name: grader(name) for name in held_out},
    )


def _fingerprints(job: Job, texts: Texts) -> dict[str, str]:
    return {
        "dataset_sha256": file_sha256(job.layout.dataset(job.sweep.condition.dataset))[:16],
        "tokenizer_sha256": tokenizer_key(texts.tokenizer),
        "template_sha256": template_key(texts.tokenizer),
    }
