"""The runs of an RL sweep: those of LoRA in lanes, which share the base and sample together; FullFT one by one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorabench.data.grading import Grader
from lorabench.data.tokens import template_key, tokenizer_key
from lorabench.models.base import load_tokenizer, max_length
from lorabench.models.lora import add_lane, can_share
from lorabench.plan import Run
from lorabench.records import file_sha256
from lorabench.training.loss import check_plain_head
from lorabench.training.rl.lanes import Lane, alone, train_lanes
from lorabench.training.rl.loop import Environment, Scores, evaluate, train_rl
from lorabench.training.rl.problems import Texts
from lorabench.training.rl.sampler import Request, Response, sample
from lorabench.training.sweep import Job, now, provenance

if TYPE_CHECKING:
    import torch


def train_runs(job: Job, runs: list[tuple[int, Run]]) -> None:
    """Train runs, given with their number in the sweep, and write each as it ends."""
    if not runs:
        return
    with ExitStack() as open_graders:
        environment = _environment(job, open_graders)
        work = _Work(job, environment, provenance(job) | _fingerprints(job, environment.texts))
        if job.sweep.condition.method == "fullft":
            for number, run in runs:
                work.train(job.load(), {run.run_id: (number, run)})
        else:
            lanes = job.plan.preset.execution.lanes
            for start in range(0, len(runs), lanes):
                together = {run.run_id: (number, run) for number, run in runs[start : start + lanes]}
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
        self._base_scores(base)
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
        check_plain_head(model)
        base = self._base_scores(model)
        started = now()
        lanes: dict[str, Lane] = {}
        for name, (number, run) in runs.items():
            self.job.announce(number, run)
            lane = name if run.condition.method == "lora" else None
            tick = partial(self.job.progress.tick, number, run)
            checkpoint, protocol = self.job.folder(run).checkpoint, self.job.plan.preset.protocol
            lanes[name] = train_rl(
                run, model, self.environment, protocol, self.job.machine, checkpoint, base, lane, tick
            )
        for name, outcome in train_lanes(lanes, partial(self._sample, model)):
            _, run = runs[name]
            adapter = name if run.condition.method == "lora" else None
            if adapter is not None:
                model.set_adapter(adapter)  # type: ignore[operator]
            self.job.write(run, outcome, model, self.provenance | {"started": started}, adapter)

    def _sample(self, model: torch.nn.Module, requests: list[Request]) -> list[Response]:
        machine, texts = self.job.machine, self.environment.texts
        autocast = machine.autocast(self.job.plan.preset.protocol)
        return sample(model, texts.tokenizer, requests, texts.stop, machine.max_cache_tokens, autocast)

    def _base_scores(self, model: torch.nn.Module) -> Scores:
        """Scores of the untouched base: once per job, from a model that has not been trained."""
        if self.base is None:
            rollouts = self.job.sweep.condition.rollouts
            assert rollouts
            asking = evaluate(self.environment, rollouts, 0, 0, None)
            self.base, _ = alone(asking, partial(self._sample, model))
        return self.base


def _environment(job: Job, open_graders: ExitStack) -> Environment:
    condition, preset = job.sweep.condition, job.plan.preset
    rollouts = condition.rollouts
    assert rollouts
    spec = job.layout.model(condition.model)
    texts = Texts(load_tokenizer(spec), rollouts, max_length(spec))

    def grader(name: str) -> Grader:
        workers = preset.execution.threads
        return open_graders.enter_context(Grader(preset.problems[name].grader, workers))

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
