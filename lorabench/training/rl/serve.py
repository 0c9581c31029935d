"""The requests of RL runs, and their computation for all lanes at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from lorabench.models.lanes.shelf import Stack
from lorabench.training.determinism import deterministically
from lorabench.training.rl.objective import ResponseGroup, StepMeasures, backward
from lorabench.training.rl.sampler import Request, Response
from lorabench.training.run import Machine

Sampler = Callable[[list[Request], bool], list[Response]]
"""Draws a response to each request, in their order; the second argument says whether a signal may end it at once."""


@dataclass(frozen=True)
class SampleRequest:
    """A request for responses. It is interruptible if nothing but these responses is lost when the job ends."""

    requests: list[Request]
    interruptible: bool = False


@dataclass(frozen=True)
class SampleResult:
    """Responses in request order, this lane's share of the seconds, and the whole batch's tokens per second."""

    responses: list[Response]
    seconds: float
    tokens_per_s: float


@dataclass(frozen=True)
class RlGradientRequest:
    """A request for the gradient of the objective on the groups of a step."""

    groups: list[ResponseGroup]


@dataclass(frozen=True)
class GradientResult:
    """The measures of a step, this lane's share of the seconds, and the whole batch's response tokens per second."""

    step: StepMeasures
    seconds: float
    tokens_per_s: float


class RlServer:
    """Serves the requests of a stack's lanes."""

    def __init__(self, stack: Stack, sampler: Sampler, machine: Machine, autocast: torch.dtype | None) -> None:
        self._stack, self._sampler, self._machine, self._autocast = stack, sampler, machine, autocast

    def __call__(
        self, requests: Mapping[str, SampleRequest | RlGradientRequest]
    ) -> dict[str, SampleResult | GradientResult]:
        """Answer all requests for responses; if there are none, compute the gradients of all lanes."""
        samples = {name: request for name, request in requests.items() if isinstance(request, SampleRequest)}
        if samples:
            return dict(serve_samples(samples, self._sampler))
        groups = {name: request.groups for name, request in requests.items() if isinstance(request, RlGradientRequest)}
        return dict(self._learn({name: groups[name] for name in self._stack.lanes}))

    def _learn(self, batches: Mapping[str, list[ResponseGroup]]) -> dict[str, GradientResult]:
        machine, started = self._machine, time.perf_counter()
        learn = partial(
            backward, self._stack, list(batches.values()), machine.max_batch_tokens, self._autocast, machine.processes
        )
        steps = deterministically(learn, self._stack.zero_grad, machine.device)
        for lane in self._stack.lanes.values():
            machine.processes.sum_gradients(lane.parameters)
        seconds = time.perf_counter() - started
        tokens = sum(step.tokens for step in steps)
        return {
            name: GradientResult(step, seconds * step.tokens / tokens, tokens / seconds)
            for name, step in zip(batches, steps, strict=True)
        }


def serve_samples(requests: Mapping[str, SampleRequest], sampler: Sampler) -> dict[str, SampleResult]:
    """Draw the responses of all lanes as one batch; the seconds are divided by the tokens of each lane."""
    started = time.perf_counter()
    interruptible = all(of_lane.interruptible for of_lane in requests.values())
    responses = sampler([request for of_lane in requests.values() for request in of_lane.requests], interruptible)
    seconds = time.perf_counter() - started
    tokens = sum(len(response.tokens) for response in responses)
    answers, start = {}, 0
    for name, of_lane in requests.items():
        drawn = responses[start : start + len(of_lane.requests)]
        start += len(of_lane.requests)
        share = sum(len(response.tokens) for response in drawn) / tokens
        answers[name] = SampleResult(drawn, seconds * share, tokens / seconds)
    return answers


def sampling_server(sampler: Sampler) -> Callable[[Mapping[str, SampleRequest]], dict[str, SampleResult]]:
    """Return a function that serves lanes which request only responses."""
    return lambda lanes: serve_samples(lanes, sampler)
