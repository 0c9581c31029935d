"""What the runs of SFT ask for, computed for all lanes that ask at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.lanes import Stack
from lorabench.training.batches import PASS_TOKENS, Batch, Row, collate, micro_batches
from lorabench.training.loss import MAX_LOGITS, add_gradient, mean_nlls
from lorabench.training.run import Machine


@dataclass(frozen=True)
class Learn:
    """The gradient of the token-weighted NLL of some training examples."""

    examples: np.ndarray


@dataclass(frozen=True)
class Measure:
    """The NLL of a whole split."""

    split: Split


@dataclass(frozen=True)
class Answer:
    """NLL in nats per scored token, of how many tokens, and of how many scored; this lane's share of the seconds."""

    nll: float
    tokens: int
    scored: int
    seconds: float


class SftLanes:
    """Serves the lanes of a stack; those that ask at once must be all of its lanes."""

    def __init__(
        self, stack: Stack, data: Mapping[Split, TokenizedSplit], machine: Machine, autocast: torch.dtype | None
    ) -> None:
        self._stack, self._data, self._machine, self._autocast = stack, data, machine, autocast

    def __call__(self, asked: Mapping[str, Learn | Measure]) -> dict[str, Answer]:
        """Answers to what each lane asks; all ask alike, since they are at the same step."""
        started = time.perf_counter()
        asks = [asked[name] for name in self._stack.lanes]
        learn = [ask.examples for ask in asks if isinstance(ask, Learn)]
        if learn:
            found = self._learn(learn)
        else:
            [split] = {ask.split for ask in asks if isinstance(ask, Measure)}
            found = self._measure(split)
        seconds = (time.perf_counter() - started) / len(asks)
        return {name: Answer(*numbers, seconds) for name, numbers in zip(self._stack.lanes, found, strict=True)}

    def _measure(self, split: Split) -> list[tuple[float, int, int]]:
        machine, data = self._machine, self._data[split]
        nlls = mean_nlls(
            self._stack.model,
            self._stack.rows,
            data,
            machine.max_batch_tokens,
            machine.device,
            self._autocast,
            machine.processes,
            machine.packing,
        )
        return [(nll, 0, 0) for nll in nlls]

    def _learn(self, examples: Sequence[np.ndarray]) -> list[tuple[float, int, int]]:
        machine, train, lanes = self._machine, self._data["train"], len(examples)
        processes = machine.processes
        own = [indices[processes.share(train.lengths()[indices])] for indices in examples]
        tokens = [int(processes.total(train.lengths()[indices].sum())) for indices in own]
        parts = self._parts(own)
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
        return list(zip(map(processes.total, nll.tolist()), tokens, scored, strict=True))

    def _parts(self, own: Sequence[np.ndarray]) -> Iterator[tuple[list[Row], ...]]:
        """Parts of the batches, of each lane a list of rows of examples."""
        machine, lengths = self._machine, [self._data["train"].lengths()[indices] for indices in own]
        cost = PASS_TOKENS[machine.device.type]
        for part in micro_batches(lengths, machine.max_batch_tokens, cost, machine.packing):
            yield tuple([indices[row] for row in rows] for indices, rows in zip(own, part, strict=True))


def _batch(split: TokenizedSplit, parts: Sequence[list[Row]]) -> Batch:
    """One part of each lane, filled up with empty rows to the same number of rows, at least one."""
    most = max(1, *map(len, parts))
    empty = np.zeros(0, np.int64)
    return collate(split, [row for part in parts for row in (*part, *[empty] * (most - len(part)))])
