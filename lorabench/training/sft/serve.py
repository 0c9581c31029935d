"""The requests of SFT runs, and their computation for all lanes at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.lanes.shelf import Stack
from lorabench.training.batches import PASS_TOKENS, Batch, Row, collate, micro_batches, scored_tokens
from lorabench.training.determinism import deterministically
from lorabench.training.loss import MAX_LOGITS, add_gradient, example_nlls
from lorabench.training.run import Machine


@dataclass(frozen=True)
class SftGradientRequest:
    """A request for the gradient of the token-weighted NLL of some training examples, given by index."""

    examples: np.ndarray


@dataclass(frozen=True)
class NllRequest:
    """A request for the NLL of a whole split."""

    split: Split


@dataclass(frozen=True)
class SftResult:
    """The answer to a request: NLL in nats per scored token, numbers of tokens and of scored tokens (tokens is 0 for
    an `NllRequest`), the NLL of each example of the split in nats (None for a gradient), and this lane's share of the
    seconds."""

    nll: float
    tokens: int
    scored: int
    example_nats: np.ndarray | None
    seconds: float


class SftServer:
    """Serves the requests of a stack's lanes, which must all be made at once."""

    def __init__(
        self, stack: Stack, data: Mapping[Split, TokenizedSplit], machine: Machine, autocast: torch.dtype | None
    ) -> None:
        self._stack, self._data, self._machine, self._autocast = stack, data, machine, autocast

    def __call__(self, requests: Mapping[str, SftGradientRequest | NllRequest]) -> dict[str, SftResult]:
        """Answer the request of each lane; all requests are of one kind, since the lanes are at the same step."""
        started = time.perf_counter()
        ordered = [requests[name] for name in self._stack.lanes]
        examples = [request.examples for request in ordered if isinstance(request, SftGradientRequest)]
        if examples:
            results = deterministically(partial(self._learn, examples), self._stack.zero_grad, self._machine.device)
        else:
            [split] = {request.split for request in ordered if isinstance(request, NllRequest)}
            results = self._measure(split)
        seconds = (time.perf_counter() - started) / len(ordered)
        return {name: SftResult(*numbers, seconds) for name, numbers in zip(self._stack.lanes, results, strict=True)}

    def _measure(self, split: Split) -> list[tuple[float, int, int, np.ndarray | None]]:
        machine, data = self._machine, self._data[split]
        scored = scored_tokens(data)
        nats = example_nlls(
            self._stack.model,
            self._stack.rows,
            data,
            machine.max_batch_tokens,
            machine.device,
            self._autocast,
            machine.processes,
            machine.packing,
        )
        return [(float(of_lane.sum()) / scored, 0, scored, of_lane) for of_lane in nats]

    def _learn(self, examples: Sequence[np.ndarray]) -> list[tuple[float, int, int, np.ndarray | None]]:
        machine, train, lanes = self._machine, self._data["train"], len(examples)
        processes = machine.processes
        share = [indices[processes.share(train.lengths()[indices])] for indices in examples]
        tokens = [int(processes.total(train.lengths()[indices].sum())) for indices in share]
        parts = self._parts(share)
        nothing: tuple[list[Row], ...] = ([],) * lanes
        batches = [_batch(train, part) for part in processes.even(parts, nothing)]
        counts = np.sum([batch.scored_by(lanes) for batch in batches], axis=0)
        scored = [int(processes.total(count)) for count in counts]
        nll = torch.zeros(lanes, dtype=torch.float64, device=machine.device)
        max_logits = None if processes.sharded else MAX_LOGITS[machine.device.type]
        for batch in batches:
            on_device = batch.to(machine.device)
            nll += add_gradient(self._stack.model, on_device, self._stack.rows, scored, self._autocast, max_logits)
        for lane in self._stack.lanes.values():
            processes.sum_gradients(lane.parameters)
        nlls = map(processes.total, nll.tolist())
        return [(*numbers, None) for numbers in zip(nlls, tokens, scored, strict=True)]

    def _parts(self, share: Sequence[np.ndarray]) -> Iterator[tuple[list[Row], ...]]:
        """Yield the micro-batches of the lanes' examples, each a list of rows for every lane."""
        machine, lengths = self._machine, [self._data["train"].lengths()[indices] for indices in share]
        cost = PASS_TOKENS[machine.device.type]
        for part in micro_batches(lengths, machine.max_batch_tokens, cost, machine.packing):
            yield tuple([indices[row] for row in rows] for indices, rows in zip(share, part, strict=True))


def _batch(split: TokenizedSplit, parts: Sequence[list[Row]]) -> Batch:
    """Build one micro-batch of all lanes, with empty rows added so that all have equally many, at least one."""
    most = max(1, *map(len, parts))
    empty = np.zeros(0, np.int64)
    return collate(split, [row for part in parts for row in (*part, *[empty] * (most - len(part)))])
