"""Training of RL sweeps: LoRA runs are trained as lanes, which share the base, sample together and learn together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorabench.data.controls import controls
from lorabench.data.grading import Grader
from lorabench.data.problems import read_problems
from lorabench.data.tokens import template_key, tokenizer_key
from lorabench.models.base import load_tokenizer, max_length, skeleton
from lorabench.models.lanes.shelf import Stack, single_lane
from lorabench.models.size import Sizes
from lorabench.models.vllm_support import check_policy, vllm_version
from lorabench.runs import PROTOCOL_VERSION, Rollouts, Run
from lorabench.training.drive import train_alone, train_lanes
from lorabench.training.loss import check_plain_head
from lorabench.training.rl.engine.sampler import Engines, EngineSampler
from lorabench.training.rl.engine.settings import engine_settings
from lorabench.training.rl.loop import Environment, Scores, evaluate, train_rl
from lorabench.training.rl.prompts import GraderProtocol, ProblemTexts
from lorabench.training.rl.refill import sample_refilling
from lorabench.training.rl.sampler import Request, Response, sample, shares_rows
from lorabench.training.rl.serve import RlServer, Sampler, sampling_server
from lorabench.training.rl.together import FirstProcessGrader, Replica, sample_in_processes
from lorabench.training.sweep import RunGroup, SweepContext, now, provenance
from lorabench.utils import signals
from lorabench.utils.files import file_sha256, write_json


class RlTrainer:
    """Trains the runs of a job's sweeps, which share one model and one problem set.

    Sweeps with equal `Rollouts` share problems, graders and the base model's scores. It is a context manager that
    closes the graders, and ends vLLM, on exit.
    """

    def __init__(self) -> None:
        self._work: dict[Rollouts, _Work] = {}
        self._open = ExitStack()
        self._engines: Engines | None = None

    def __enter__(self) -> RlTrainer:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __call__(self, context: SweepContext, runs: list[tuple[int, Run]]) -> None:
        """Train the unfinished ones of some runs, given with their number in the sweep, and write each as it ends."""
        groups = context.unfinished_groups(runs)
        if not groups:
            return
        rollouts = context.sweep.condition.rollouts
        assert rollouts
        if rollouts.sampler == "vllm":
            condition = context.sweep.condition
            spec = context.layout.model(condition.model)
            check_policy(spec, context.machine.device, condition.rank, condition.placement)
            if self._engines is None:
                self._engines = self._open.enter_context(Engines(context.machine.processes))
        if rollouts not in self._work:
            environment = _environment(context, self._open)
            fingerprints = provenance(context) | _fingerprints(context, environment.texts)
            if self._engines is not None:
                fingerprints["packages"] |= {"vllm": vllm_version()}
            self._work[rollouts] = _Work(environment, fingerprints, self._engines)
        for group in groups:
            self._work[rollouts].train(context, group)


@dataclass
class _Work:
    """The environment of runs with equal `Rollouts`, and the base model's scores once they are known.

    Attributes:
        engines: the engine vLLM of the job; None where the project's own code draws.
    """

    environment: Environment
    provenance: dict[str, Any]
    engines: Engines | None
    base: Scores | None = None

    def train(self, context: SweepContext, runs: RunGroup) -> None:
        """Train a group of runs as lanes of a newly loaded base model."""
        machine = context.machine
        context.begin()
        model: Any = context.load()
        check_plain_head(model)
        together = [run for _, run in runs.values()]
        condition = together[0].condition
        if self.engines is None and not machine.processes.sharded:
            self._base_scores(context, partial(self._sample, context, single_lane(model, "")))
        if condition.method == "lora":
            model = context.with_lora(model, together)
        sizes = Sizes.of(model)
        stack = self._stack(context, model, together)
        draw: Sampler
        if self.engines is not None:
            draw = partial(self._sample_by_engine, context, self._engine_sampler(context, stack, self.engines))
        elif machine.processes.sharded:
            draw = partial(self._sample_from_replica, context, self._replica(context, stack, together[0]))
        else:
            draw = partial(self._sample, context, stack)
        base = self._base_scores(context, draw)
        started, checkpoints, protocol = now(), context.checkpoints(together), context.plan.preset.protocol
        lanes = {}
        for name, (number, run) in runs.items():
            context.announce(number, run)
            lanes[name] = train_rl(
                run,
                stack.lanes[name],
                self.environment,
                protocol,
                machine.processes,
                checkpoints,
                base,
                context.ticker(number, run),
            )
        for name, outcome in train_lanes(lanes, RlServer(stack, draw, machine, machine.autocast(protocol))):
            context.write(runs[name][1], outcome, stack, sizes, self.provenance | {"started": started})
            checkpoints.ended(name)
            stack.drop(name)

    def _stack(self, context: SweepContext, model: Any, together: list[Run]) -> Stack:
        """Return the stack of the runs, whose model may be sharded."""
        run, processes = together[0], context.machine.processes
        lora = run.condition.method == "lora"
        if processes.sharded:
            return single_lane(processes.shard(model), run.run_id, run.run_id if lora else None)
        return context.stacked(model, together) if lora else single_lane(model, run.run_id)

    def _replica(self, context: SweepContext, stack: Stack, run: Run) -> Replica:
        """Return the copy of a sharded model from which each process samples."""
        blank: Any = skeleton(context.layout.model(run.condition.model))
        if run.condition.method == "lora":
            blank = context.with_lora(blank, [run])
        machine = context.machine
        return Replica(stack.model, blank, machine.device, machine.autocast(context.plan.preset.protocol))

    def _sample_from_replica(
        self, context: SweepContext, replica: Replica, requests: list[Request], interruptible: bool
    ) -> list[Response]:
        return self._sample(context, single_lane(replica.refreshed(), ""), requests, interruptible)

    def _engine_sampler(self, context: SweepContext, stack: Stack, engines: Engines) -> EngineSampler:
        texts, condition = self.environment.texts, context.sweep.condition
        problems = (*self.environment.splits.values(), *self.environment.held_out.values())
        longest = max(len(prompt) for of_split in problems for prompt in of_split.prompts)
        settings = engine_settings(context, longest + texts.stop.max_new_tokens, bool(texts.stop.texts))
        return EngineSampler(engines, settings, stack, condition.rank, condition.alpha, texts.stop)

    def _sample_by_engine(
        self, context: SweepContext, sampler: EngineSampler, requests: list[Request], interruptible: bool
    ) -> list[Response]:
        return sampler(requests, _interrupt(context, interruptible))

    def _sample(
        self, context: SweepContext, stack: Stack, requests: list[Request], interruptible: bool
    ) -> list[Response]:
        machine, texts = context.machine, self.environment.texts
        autocast = machine.autocast(context.plan.preset.protocol)
        interrupt = _interrupt(context, interruptible)

        # On a CPU long responses are drawn in batches, so that numbers stay the same to the last bit.
        refills = machine.device.type == "cuda" and not shares_rows(texts.stop)
        sampler = sample_refilling if refills else sample

        def draw(share: list[Request]) -> list[Response]:
            return sampler(stack, texts.tokenizer, share, texts.stop, machine.max_cache_tokens, autocast, interrupt)

        return sample_in_processes(requests, draw, machine.processes)

    def _base_scores(self, context: SweepContext, draw: Sampler) -> Scores:
        """Return the base model's scores.

        They are read from a file that other jobs share; if there is none, the first call evaluates the model, which is
        then still untrained, and writes it.
        """
        if self.base is None:
            rollouts, processes = context.sweep.condition.rollouts, context.machine.processes
            assert rollouts
            path = context.layout.base_scores(_determining(context, rollouts, self.provenance))
            self.base = _read_scores(path)
            # All processes read or all evaluate, even if another job writes the file at this moment.
            if processes.any(self.base is None):
                evaluation = evaluate(self.environment, rollouts, 0, 0, None)
                self.base, _, _ = train_alone(evaluation, sampling_server(draw))
                if processes.first:
                    write_json(self.base, path)
        assert self.base is not None
        return self.base


def _interrupt(context: SweepContext, interruptible: bool) -> Callable[[], None]:
    """Return what is called while responses are drawn."""
    # Several processes would have to agree at every position.
    return signals.check if interruptible and context.machine.processes.count == 1 else lambda: None


def _environment(context: SweepContext, open_graders: ExitStack) -> Environment:
    condition, preset = context.sweep.condition, context.plan.preset
    rollouts = condition.rollouts
    assert rollouts
    spec = context.layout.model(condition.model)
    texts = ProblemTexts(load_tokenizer(spec), rollouts, max_length(spec))

    def grader(name: str) -> GraderProtocol:
        workers = preset.execution.threads
        opened = open_graders.enter_context(Grader(preset.problems[name].grader, workers))
        return FirstProcessGrader(opened, context.machine.processes)

    rows = read_problems(context.layout.dataset(condition.dataset))
    train, test = (
        [(row["question"], row["answer"]) for row in rows if row["split"] == split] for split in ("train", "test")
    )
    held_out = {name: texts.read(context.layout.dataset(name))["test"] for name in rollouts.held_out}
    return Environment(
        texts,
        texts.read(context.layout.dataset(condition.dataset)),
        held_out,
        grader(condition.dataset),
        {name: grader(name) for name in held_out},
        controls(train, test),
    )


def _determining(context: SweepContext, rollouts: Rollouts, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the base model's scores depend on, as plain data."""
    preset, layout = context.plan.preset, context.layout
    names = (context.sweep.condition.dataset, *rollouts.held_out)
    own = ("device", "packages", "model_sha256", "hub_commits", "tokenizer_sha256", "template_sha256")
    return {
        "protocol_version": PROTOCOL_VERSION,
        "precision": preset.protocol.precision,
        "rollouts": rollouts.determining,
        "problems": [[file_sha256(layout.dataset(name)), preset.problems[name].grader] for name in names],
        **{name: provenance[name] for name in own},
    }


def _read_scores(path: Path) -> Scores | None:
    """Return scores from a file, None if there is no file that can be read."""
    try:
        scores: Scores = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return scores


def _fingerprints(context: SweepContext, texts: ProblemTexts) -> dict[str, str]:
    return {
        "dataset_sha256": file_sha256(context.layout.dataset(context.sweep.condition.dataset))[:16],
        "tokenizer_sha256": tokenizer_key(texts.tokenizer),
        "template_sha256": template_key(texts.tokenizer),
    }
