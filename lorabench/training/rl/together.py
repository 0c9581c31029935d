"""RL in several processes: each process samples a share of the responses, and all learn from the same responses.

A response has its own random numbers (see `sampler.py`), so it is the same in whichever process it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorabench.data.grading import Grader
from lorabench.training.distributed import Processes, full_tensor
from lorabench.training.rl.sampler import Request, Response


def sample_in_processes(
    requests: list[Request], draw: Callable[[list[Request]], list[Response]], processes: Processes
) -> list[Response]:
    """Draw this process's share of the responses and gather all; every process returns the same, in request order."""
    if processes.count == 1:
        return draw(requests)
    # Shares are of prompts, since a prompt goes through the model once for all its responses.
    prompts = list(dict.fromkeys((request.lane, request.prompt) for request in requests))
    owner = dict(zip(prompts, processes.owners(np.array([len(prompt) for _, prompt in prompts])), strict=True))
    owners = [owner[request.lane, request.prompt] for request in requests]
    drawn = draw([request for request, rank in zip(requests, owners, strict=True) if rank == processes.rank])
    # Each process sends one row of doubles, which hold any token and any single-precision number exactly.
    packed = np.concatenate([np.zeros(0), *map(_packed, drawn)])
    row = np.zeros(int(processes.most(len(packed))))
    row[: len(packed)] = packed
    streams = [iter(_unpacked(numbers)) for numbers in processes.gather(row)]
    return [next(streams[rank]) for rank in owners]


def _packed(response: Response) -> np.ndarray:
    """Encode a response as numbers: the number of tokens, whether it is truncated, tokens, log-probabilities."""
    return np.concatenate([[len(response.tokens), response.truncated], response.tokens, response.logprobs])


def _unpacked(numbers: np.ndarray) -> Iterator[Response]:
    """Decode the responses of one process; the row is filled up with zeros."""
    start = 0
    while start < len(numbers) and numbers[start]:
        length = int(numbers[start])
        tokens, logprobs = numbers[start + 2 :][:length], numbers[start + 2 + length :][:length]
        yield Response(tokens.astype(np.int64), logprobs.astype(np.float32), bool(numbers[start + 1]))
        start += 2 + 2 * length


@dataclass(frozen=True)
class FirstProcessGrader:
    """A grader that uses the first process's verdicts in all processes, since time limits may expire in some only."""

    grader: Grader
    processes: Processes

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each response is right."""
        verdicts = self.grader.grade(responses, answers) if self.processes.first else [False] * len(responses)
        return [bool(right) for right in self.processes.gather(verdicts)[0]]


class Replica:
    """A full copy of a sharded model in each process, to sample from.

    The processes sample different numbers of tokens, so they cannot sample from the sharded model together. The weights
    of linear layers are stored in autocast's type, to which autocast would convert them for every token; samples and
    their log-probabilities are therefore those of the sharded model.

    Args:
        sharded: the model that is trained.
        blank: the same model without weights; it receives them.
    """

    def __init__(
        self, sharded: torch.nn.Module, blank: torch.nn.Module, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self._sharded, self._model = sharded, blank
        trained_name = ".lora_" if any(".lora_" in name for name, _ in sharded.named_parameters()) else ""
        self._trained: list[tuple[torch.Tensor, torch.Tensor]] = []
        # A tied weight becomes two here, since the embedding and the unembedding may have different types.
        for name, parameter in sharded.named_parameters(remove_duplicate=False):
            layer, _, attribute = name.rpartition(".")
            module = blank.get_submodule(layer)
            dtype = autocast if isinstance(module, torch.nn.Linear) else None
            weight = full_tensor(parameter.detach()).to(device=device, dtype=dtype, copy=True)
            copied = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, attribute, copied)
            if trained_name in name:
                self._trained.append((parameter, copied))
        blank.to(device)

    @torch.no_grad()
    def refreshed(self) -> torch.nn.Module:
        """Copy the model's present weights and return the copy. Every process must call this."""
        for parameter, copied in self._trained:
            copied.copy_(full_tensor(parameter.detach()))
        return self._model
