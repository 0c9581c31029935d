"""What the runs of RL ask for, done for all lanes that ask at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lorabench.models.lanes import Stack
from lorabench.training.rl.objective import Group, Step, backward
from lorabench.training.rl.sampler import Request, Response
from lorabench.training.run import Machine

Sampler = Callable[[list[Request]], list[Response]]


@dataclass(frozen=True)
class Sample:
    """Responses to requests."""

    requests: list[Request]


@dataclass(frozen=True)
class Sampled:
    """Responses in the order of the requests; this lane's share of the seconds, and the speed of the whole batch."""

    responses: list[Response]
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True)
class Learn:
    """The gradient of the objective on a step's groups."""

    groups: list[Group]


@dataclass(frozen=True)
class Learned:
    """What was measured; this lane's share of the seconds, and the speed of the whole batch in response tokens."""

    step: Step
    seconds: float
    tokens_per_s: float


class RlLanes:
    """Serves the lanes of a stack."""

    def __init__(self, stack: Stack, sampler: Sampler, machine: Machine, autocast: torch.dtype | None) -> None:
        self._stack, self._sampler, self._machine, self._autocast = stack, sampler, machine, autocast

    def __call__(self, asked: Mapping[str, Sample | Learn]) -> dict[str, Sampled | Learned]:
        """Responses to the lanes that ask for some; when none does any more, gradients of all."""
        requests = {name: ask.requests for name, ask in asked.items() if isinstance(ask, Sample)}
        if requests:
            return dict(sampled(requests, self._sampler))
        groups = {name: ask.groups for name, ask in asked.items() if isinstance(ask, Learn)}
        return dict(self._learn({name: groups[name] for name in self._stack.lanes}))

    def _learn(self, batches: Mapping[str, list[Group]]) -> dict[str, Learned]:
        machine, started = self._machine, time.perf_counter()
        steps = backward(
            self._stack, list(batches.values()), machine.max_batch_tokens, self._autocast, machine.processes
        )
        for lane in self._stack.lanes.values():
            machine.processes.sum_gradients(lane.parameters)
        seconds = time.perf_counter() - started
        tokens = sum(step.tokens for step in steps)
        return {
            name: Learned(step, seconds * step.tokens / tokens, tokens / seconds)
            for name, step in zip(batches, steps, strict=True)
        }


def sampled(asked: Mapping[str, list[Request]], sampler: Sampler) -> dict[str, Sampled]:
    """Responses to all requests, drawn as one batch; the seconds are shared out by tokens."""
    started = time.perf_counter()
    responses = sampler([request for requests in asked.values() for request in requests])
    seconds = time.perf_counter() - started
    tokens = sum(len(response.tokens) for response in responses)
    found, start = {}, 0
    for name, requests in asked.items():
        own = responses[start : start + len(requests)]
        start += len(requests)
        share = sum(len(response.tokens) for response in own) / tokens
        found[name] = Sampled(own, seconds * share, tokens / seconds)
    return found


def sampling_alone(sampler: Sampler) -> Callable[[Mapping[str, Sample]], dict[str, Sampled]]:
    """Serves what asks for responses only."""
    return lambda asked: sampled({name: ask.requests for name, ask in asked.items()}, sampler)
