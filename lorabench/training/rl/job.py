"""The runs of an RL sweep: those of LoRA in lanes, which share the base and sample together; FullFT one by one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorabench.data.grading import Grader
from lorabench.data.tokens import template_key, tokenizer_key
from lorabench.models.base import load_tokenizer, max_length, skeleton
from lorabench.models.lora import add_lane
from lorabench.models.lora_lanes import can_share
from lorabench.plan import Run
from lorabench.records import file_sha256
from lorabench.training import stop
from lorabench.training.loss import check_plain_head
from lorabench.training.rl.checkpoints import Checkpoints
from lorabench.training.rl.lanes import Lane, Sampler, alone, train_lanes
from lorabench.training.rl.loop import Environment, Scores, evaluate, train_rl
from lorabench.training.rl.problems import Grades, Texts
from lorabench.training.rl.sampler import Request, Response, sample
from lorabench.training.rl.together import OneVerdict, Replica, draw_together
from lorabench.training.sweep import Job, now, provenance

if TYPE_CHECKING:
    import torch


def train_runs(job: Job, runs: list[tuple[int, Run]]) -> None:
    """Train those runs that are not finished, given with their number in the sweep, and write each as it ends."""
    # Formed before finished ones are left out: what goes on does so beside the same runs.
    # A sharded model keeps to what is trained when it is sharded; there, lanes take turns.
    alone = job.sweep.condition.method == "fullft" or job.machine.processes.sharded
    lanes = 1 if alone else job.plan.preset.execution.lanes
    groups = [job.unfinished(runs[start : start + lanes]) for start in range(0, len(runs), lanes)]
    if not any(groups):
        return
    with ExitStack() as open_graders:
        environment = _environment(job, open_graders)
        work = _Work(job, environment, provenance(job) | _fingerprints(job, environment.texts))
        for group in filter(None, groups):
            together = {run.run_id: (number, run) for number, run in group}
            if job.sweep.condition.method == "fullft":
                work.train(job.load(), together)
            else:
                work.train_lora(together)


@dataclass
class _Work:
    """The work of one job, and the base's scores once they are known."""

    job: Job
    environment: Environment
    provenance: dict[str, Any]
    base: Scores | None = None

    def train_lora(self, runs: Mapping[str, tuple[int, Run]]) -> None:
        """Train LoRA runs in lanes, as far as their adapters can go through the model together."""
        base = self.job.load()
        if not self.job.machine.processes.sharded:
            self._base_scores(partial(self._sample, base))
        first, *others = runs
        model = self.job.with_lora(base, runs[first][1], first)
        if not can_share(model):
            self.train(model, {first: runs[first]})
            if others:
                self.train_lora({name: runs[name] for name in others})
            return
        for name in others:
            run = runs[name][1]
            add_lane(model, name, run.seed, run.condition.init_a or 1.0)
        self.train(model, runs)

    def train(self, model: torch.nn.Module, runs: Mapping[str, tuple[int, Run]]) -> None:
        """Train the runs that a model is ready for; for LoRA it has an adapter named after each."""
        if self.job.machine.processes.any(stop.requested()):
            stop.end()
        check_plain_head(model)
        if self.job.machine.processes.sharded:
            model, draw = self._sharded(model, runs)
        else:
            draw = partial(self._sample, model)
        base = self._base_scores(draw)
        started = now()
        paths = {name: self.job.folder(run).checkpoint for name, (_, run) in runs.items()}
        checkpoints = Checkpoints(paths, self.job.machine.checkpoint_seconds, self.job.machine.processes)
        protocol = self.job.plan.preset.protocol
        lanes: dict[str, Lane] = {}
        for name, (number, run) in runs.items():
            self.job.announce(number, run)
            lane = name if run.condition.method == "lora" else None
            tick = self.job.ticker(number, run)
            lanes[name] = train_rl(
                run, model, self.environment, protocol, self.job.machine, checkpoints, base, lane, tick
            )
        for name, outcome in train_lanes(lanes, draw):
            _, run = runs[name]
            adapter = name if run.condition.method == "lora" else None
            if adapter is not None:
                model.set_adapter(adapter)  # type: ignore[operator]
            self.job.write(run, outcome, model, self.provenance | {"started": started}, adapter)
            checkpoints.ended(name)

    def _sharded(self, model: torch.nn.Module, runs: Mapping[str, tuple[int, Run]]) -> tuple[torch.nn.Module, Sampler]:
        """The model of a run, spread over the processes, and what samples from it."""
        blank: torch.nn.Module = skeleton(self.job.layout.model(self.job.sweep.condition.model))
        for name, (_, run) in runs.items():
            if run.condition.method == "lora":
                blank = self.job.with_lora(blank, run, name)
        machine = self.job.machine
        sharded = machine.processes.shard(model)
        replica = Replica(sharded, blank, machine.device, machine.autocast(self.job.plan.preset.protocol))
        return sharded, lambda requests: self._sample(replica.refreshed(), requests)

    def _sample(self, model: torch.nn.Module, requests: list[Request]) -> list[Response]:
        machine, texts = self.job.machine, self.environment.texts
        autocast = machine.autocast(self.job.plan.preset.protocol)

        def draw(share: list[Request]) -> list[Response]:
            return sample(model, texts.tokenizer, share, texts.stop, machine.max_cache_tokens, autocast)

        return draw_together(requests, draw, machine.processes)

    def _base_scores(self, draw: Sampler) -> Scores:
        """Scores of the untouched base: once per job, from a model that has not been trained."""
        if self.base is None:
            rollouts = self.job.sweep.condition.rollouts
            assert rollouts
            asking = evaluate(self.environment, rollouts, 0, 0, None)
            self.base, _ = alone(asking, draw)
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
