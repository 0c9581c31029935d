"""The training of RL runs: their problems and graders, the base model's scores, and where responses are drawn.

Several processes draw a share of the responses each, and all learn from the same responses. A response has its own
random numbers (see `sampler.py`), so it is the same in whichever process it is drawn.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from lorabench.data.grading import Grader
from lorabench.data.problems import controls, read_problems
from lorabench.data.tokens import template_key, tokenizer_key
from lorabench.models.base import load_config, load_tokenizer, max_length, skeleton
from lorabench.models.vllm_support import check_vllm, vllm_version
from lorabench.runs import Rollouts, Run
from lorabench.training.context import Base, SweepContext, with_adapter
from lorabench.training.distributed import full_tensor
from lorabench.training.rl.engine import PolicyEngine, engine_settings
from lorabench.training.rl.loop import Environment, Grade, ProblemTexts, Sampler, Scores, evaluate, train_rl
from lorabench.training.rl.objective import check_finite
from lorabench.training.rl.sampler import Request, Response, sample, sample_in_processes
from lorabench.training.run import Machine
from lorabench.utils.files import file_sha256


class RlTrainer(AbstractContextManager["RlTrainer"]):
    """Trains the runs of a job's sweeps; on exit it closes the graders, and ends vLLM.

    The sweeps share one model and one problem set; those with equal `Rollouts` share graders and the base's scores.
    """

    def __init__(self) -> None:
        self._base = Base()
        self._open = ExitStack()
        self._environments: dict[Rollouts, tuple[Environment, dict[str, Any]]] = {}
        self._scores: dict[Rollouts, Scores] = {}
        self._engine: PolicyEngine | None = None

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def __call__(self, context: SweepContext, run: Run, tick: Callable[[int], None]) -> None:
        """Train a run and write it; UserError says that vLLM can't draw from the policies, or no folder has room."""
        # Threads of sampling and grading take so many bytes at least. Where they can't have them, libraries in C and
        # Rust end the process by a signal.
        mmap.mmap(-1, 32 << 20).close()
        condition, machine, rollouts = run.condition, context.machine, run.condition.rollouts
        assert rollouts
        if rollouts.sampler == "vllm":
            spec = context.layout.model(condition.model)
            check_vllm(spec, condition.rank, condition.placement, trains=True)
            # Jobs that run at the same time train different runs.
            log = context.layout.logs / f"{run.run_id}.vllm.log"
            self._engine = self._engine or self._open.enter_context(PolicyEngine(machine.processes, log))
        if rollouts not in self._environments:
            environment = self._environment(context)
            source = context.provenance() | {
                "dataset_sha256": file_sha256(context.layout.dataset(condition.dataset))[:16],
                "tokenizer_sha256": tokenizer_key(environment.texts.tokenizer),
                "template_sha256": template_key(environment.texts.tokenizer),
            }
            if self._engine is not None:
                source["packages"] |= {"vllm": vllm_version()}
            self._environments[rollouts] = environment, source
        environment, source = self._environments[rollouts]
        if self._engine is None and machine.processes.count == 1:
            self._base_scores(rollouts, self._sampler(context, self._base.untrained(context), run))
        with self._base.trainable(context, run) as model:
            draw = self._sampler(context, model, run)
            base, started = self._base_scores(rollouts, draw), datetime.now(UTC).isoformat(timespec="seconds")
            protocol, checkpoint = context.plan.preset.protocol, context.checkpoint(run)
            outcome = train_rl(run, model, environment, protocol, machine, checkpoint, draw, base, tick)
            context.write(run, model, outcome, source | {"started": started})

    def _environment(self, context: SweepContext) -> Environment:
        """Read the problems of a sweep and start their graders."""
        condition, preset, processes = context.sweep.condition, context.plan.preset, context.machine.processes
        rollouts, layout = condition.rollouts, context.layout
        assert rollouts
        spec = layout.model(condition.model)
        config, longest = load_config(spec), max_length(spec)
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            # Rows that responses share have masks without the window.
            longest = min(longest, config.sliding_window)
        texts = ProblemTexts(load_tokenizer(spec), rollouts, longest)

        def grading(name: str) -> Grade:
            grader = self._open.enter_context(Grader(preset.problems[name].grader, preset.execution.threads))

            def grade(responses: list[str], answers: list[str]) -> np.ndarray:
                # All processes use the first one's verdicts, since time limits may expire in some only.
                verdicts = grader.grade(responses, answers) if processes.first else [False] * len(responses)
                return np.asarray(processes.gather(verdicts)[0])

            return grade

        dataset = layout.dataset(condition.dataset)
        rows = read_problems(dataset)
        train, test = (
            [(row["question"], row["answer"]) for row in rows if row["split"] == split] for split in ("train", "test")
        )
        held_out = {name: (texts.read(layout.dataset(name))["test"], grading(name)) for name in rollouts.held_out}
        return Environment(texts, texts.read(dataset), grading(condition.dataset), held_out, controls(train, test))

    def _sampler(self, context: SweepContext, model: torch.nn.Module, run: Run) -> Sampler:
        """Return the function that draws from a model: by vLLM, or by this project's code."""
        condition, machine, engine = run.condition, context.machine, self._engine
        assert condition.rollouts
        environment, _ = self._environments[condition.rollouts]
        texts, stop = environment.texts, environment.texts.stop
        replica: Callable[[], torch.nn.Module] | None = None
        if engine is not None:
            problems = (*environment.splits.values(), *(held_out for held_out, _ in environment.held_out.values()))
            longest = max(len(prompt) for split in problems for prompt, _ in split) + stop.max_new_tokens
            settings = engine_settings(context, longest, bool(stop.texts))
        elif machine.processes.count > 1:
            blank: Any = skeleton(context.layout.model(condition.model))
            if condition.method != "fullft":
                blank = with_adapter(blank, context, run)
            replica = replica_of(model, blank, machine)

        def draw(requests: list[Request]) -> list[Response]:
            if engine is not None:
                responses = engine.draw(model, settings, requests, stop)
            else:
                policy = replica() if replica else model
                others = stop, machine.max_cache_tokens, machine.autocast
                responses = sample_in_processes(
                    requests, lambda share: sample(policy, texts.tokenizer, share, *others), machine.processes
                )
            check_finite(model, requests, responses, machine)
            return responses

        return draw

    def _base_scores(self, rollouts: Rollouts, draw: Sampler) -> Scores:
        """Return the base model's scores; the first call evaluates the model, which is then still untrained."""
        if rollouts not in self._scores:
            environment, _ = self._environments[rollouts]
            self._scores[rollouts], _ = evaluate(environment, rollouts, 0, 0, draw)
        return self._scores[rollouts]


def replica_of(sharded: torch.nn.Module, blank: torch.nn.Module, machine: Machine) -> Callable[[], torch.nn.Module]:
    """Return a function that returns a full copy of a sharded model in each process, to sample from.

    Every process must call it. The processes sample different numbers of tokens, so they cannot sample from the sharded
    model together. The weights go into `blank`, those of linear layers in autocast's type, to which autocast would
    convert them for every token.
    """
    trained: list[tuple[torch.Tensor, torch.Tensor]] = []
    # A tied weight becomes two here, since the embedding and the unembedding may have different types.
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        layer, _, attribute = name.rpartition(".")
        module = blank.get_submodule(layer)
        dtype = machine.autocast if isinstance(module, torch.nn.Linear) else None
        weight = full_tensor(parameter.detach()).to(device=machine.device, dtype=dtype, copy=True)
        copied = torch.nn.Parameter(weight, requires_grad=False)
        setattr(module, attribute, copied)
        if parameter.requires_grad:
            trained.append((parameter, copied))
    blank.to(machine.device)

    @torch.no_grad()
    def refreshed() -> torch.nn.Module:
        for parameter, copied in trained:
            copied.copy_(full_tensor(parameter.detach()))
        return blank

    return refreshed
