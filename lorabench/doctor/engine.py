"""The engine vLLM next to a trainer, as in RL: whether it draws from the policy that the trainer has, and how fast.

The models have random weights, which the engine reads from a temporary folder.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lorabench.config.inputs import PathModel
from lorabench.config.preset import Preset
from lorabench.doctor.bench import fits_one_gpu, largest, random_model, subject_of
from lorabench.doctor.record import Check, judged
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import dimensions
from lorabench.planning.engine import engine_seconds, handover_seconds, uses_engine
from lorabench.planning.plan import Plan
from lorabench.runs import MAX_KL, Condition, Run, Sweep
from lorabench.store.layout import Layout
from lorabench.training.context import SweepContext
from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.rl.engine import PolicyEngine, engine_settings
from lorabench.training.rl.objective import ResponseGroup, StepMeasures, backward
from lorabench.training.rl.sampler import Request, Response, Stop
from lorabench.training.run import Machine, clip_gradient, deterministically, make_optimizer

KL = {"fp32": 1e-4, "bf16": MAX_KL}
"""Largest KL of engine and learner in nats per token, by precision. In fp32 that of whole runs on a CPU is smaller; in
bf16 it is the limit above which a step of RL is warned about."""

# The number of prompts, each with a response, and their tokens. On a GPU prompts are many and long, as in RL, since
# kernels for LoRA have failed on such alone.
_PROMPTS = {"cpu": (8, 64), "cuda": (64, 1024)}
_TOKENS = 128


@dataclass(frozen=True)
class Drawing:
    """What was seen of an engine that drew responses after an update of its policy."""

    prompts: int
    """The number of prompts, each with a response."""
    prompt_tokens: int
    """The tokens of each prompt."""
    measures: StepMeasures
    """The learner's measures of these responses."""
    started: float
    """Seconds in which the engine started, and drew the first responses."""
    handed_over: float
    """Seconds in which the updated policy was handed over and the first tokens were drawn."""
    drawn: float
    """Seconds in which the other tokens were drawn."""


def policies(plan: Plan) -> list[Sweep]:
    """Return the sweeps whose policies fit one GPU with their engine: the largest of FullFT and of LoRA."""
    engines = [sweep for sweep in plan.sweeps if uses_engine(plan.preset, sweep.condition)]
    return [sweep for sweep in largest(plan.preset, engines) if fits_one_gpu(plan.preset, sweep)]


def measure_drawing(plan: Plan, layout: Layout, machine: Machine, sweep: Sweep) -> Drawing:
    """Draw responses from a policy and from its update, by an engine next to a trainer.

    In between, the trainer makes a whole training step on as many tokens as go through the model at once.

    Raises:
        UserError: the engine can't be started, or fails.
    """
    preset, condition, subject = plan.preset, sweep.condition, subject_of(plan, sweep)
    rng, vocabulary, length = np.random.default_rng(0), subject.sizes.vocabulary, subject.length
    batch = [_group((0,), Response(rng.integers(vocabulary, size=length), np.zeros(length, np.float32), True))]
    number, prompt_tokens = _PROMPTS[machine.device.type]
    prompts = [tuple(prompt) for prompt in rng.integers(vocabulary, size=(number, prompt_tokens)).tolist()]
    requests = [Request(prompt, (0, place)) for place, prompt in enumerate(prompts)]
    log = layout.logs / "doctor.vllm.log"
    with tempfile.TemporaryDirectory() as folder, PolicyEngine(SINGLE_PROCESS, log) as engine:
        model = random_model(
            subject.sizes, condition, preset, machine.device, recomputed=subject.recomputed, folder=Path(folder)
        )
        spec = PathModel(
            kind="path", path=folder, parameters=subject.sizes.parameters, hidden_size=subject.sizes.hidden
        )
        random = Layout(layout.name, preset.model_copy(update={"models": preset.models | {condition.model: spec}}))
        context = SweepContext(plan, sweep, random, machine)
        settings = engine_settings(context, max(length, prompt_tokens + _TOKENS), tokenizes=False)
        parameters = trained_parameters(model)
        optimizer = make_optimizer(parameters, Run(condition, 0.0, 0), preset.protocol)

        def draw(tokens: int) -> tuple[list[Response], float]:
            began = time.perf_counter()
            return engine.draw(model, settings, requests, Stop((), tokens)), time.perf_counter() - began

        def learn(groups: list[ResponseGroup]) -> StepMeasures:
            measures = deterministically(partial(backward, model, groups, machine), model.zero_grad, machine)
            clip_gradient(parameters.values(), preset.protocol.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return measures

        _, started = draw(_TOKENS)
        learn(batch * subject.rows)
        _move(model, condition)
        _, handed_over = draw(1)
        responses, seconds = draw(_TOKENS)
        measures = learn(list(map(_group, prompts, responses)))
        return Drawing(number, prompt_tokens, measures, started, handed_over, seconds - handed_over)


def _group(prompt: tuple[int, ...], response: Response) -> ResponseGroup:
    """Return a group of one response, whose step does all its work, and has no gradient."""
    return ResponseGroup.of(prompt, [response], np.zeros(1))


def _move(model: torch.nn.Module, condition: Condition) -> None:
    """Change the weights, or what LoRA adds to them, by about as much as they are large.

    A policy that was not handed over, or in part, then has clearly other log-probabilities.
    """
    for name, parameter in trained_parameters(model).items():
        size = 0.02
        if ".lora_A." in name:
            # Random weights, and B too, have a standard deviation of 0.02.
            assert condition.rank
            assert condition.alpha
            size = condition.rank**0.5 / condition.alpha
        parameter.data.add_(size * torch.randn_like(parameter))


def check_policy(preset: Preset, drawing: Drawing) -> Check:
    """Compare the log-probabilities of the engine with those of the learner."""
    measures, limit = drawing.measures, KL[preset.protocol.precision]
    sentence = (
        f"responses of {_TOKENS} tokens to {drawing.prompts} prompts of {drawing.prompt_tokens} after an update of the "
        "policy: KL of engine and learner, and the learner's probability of a token is at most "
        f"{measures.ratio_max:.3g} times the engine's"
    )
    return judged(abs(measures.kl) <= limit, sentence, measures.kl, limit, "nats per token")


def check_drawing(preset: Preset, condition: Condition, drawing: Drawing | None) -> Check:
    """Return the speed of the engine, which has no limit, with that of the plan on a GPU."""
    if drawing is None:
        return Check(status="skipped", sentence="the engine failed")
    tokens, planned = drawing.prompts * (_TOKENS - 1), None
    sentence = (
        f"{drawing.prompts} responses at once; the engine started in {drawing.started:.0f} s and took an updated "
        f"policy in {drawing.handed_over:.2g} s"
    )
    if preset.execution.gpu is not None:
        sentence += f" (planned: {handover_seconds(preset, condition):.2g} s)"
        sizes = dimensions(preset.models[condition.model])
        planned = tokens / engine_seconds(preset, sizes, tokens, _TOKENS - 1, drawing.prompt_tokens + _TOKENS / 2)
    return Check(status="measured", sentence=sentence, value=tokens / drawing.drawn, planned=planned, unit="tokens/s")
