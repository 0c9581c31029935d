"""RL in several processes: each samples a share of the responses, all learn from the same ones.

A response has random numbers of its own (see `sampler.py`), so it is the same whoever draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorabench.data.grading import Grader
from lorabench.training.distributed import Processes, whole
from lorabench.training.rl.sampler import Request, Response


def draw_together(
    requests: list[Request], draw: Callable[[list[Request]], list[Response]], processes: Processes
) -> list[Response]:
    """Responses to all requests, in their order, of which this process draws its share; the same in each."""
    if processes.count == 1:
        return draw(requests)
    # By prompts, since one goes through the model once for all its responses.
    prompts = list(dict.fromkeys((request.lane, request.prompt) for request in requests))
    owner = dict(zip(prompts, processes.owners(np.array([len(prompt) for _, prompt in prompts])), strict=True))
    owners = [owner[request.lane, request.prompt] for request in requests]
    own = draw([request for request, rank in zip(requests, owners, strict=True) if rank == processes.rank])
    # One row of numbers per process: exact, since a double holds any token and any single-precision number.
    packed = np.concatenate([np.zeros(0), *map(_packed, own)])
    row = np.zeros(int(processes.most(len(packed))))
    row[: len(packed)] = packed
    streams = [iter(_unpacked(numbers)) for numbers in processes.gather(row)]
    return [next(streams[rank]) for rank in owners]


def _packed(response: Response) -> np.ndarray:
    """A response as numbers: how many tokens, whether truncated, tokens, log-probabilities."""
    return np.concatenate([[len(response.tokens), response.truncated], response.tokens, response.logprobs])


def _unpacked(numbers: np.ndarray) -> Iterator[Response]:
    """The responses of one process; what follows them is zero."""
    start = 0
    while start < len(numbers) and numbers[start]:
        length = int(numbers[start])
        tokens, logprobs = numbers[start + 2 :][:length], numbers[start + 2 + length :][:length]
        yield Response(tokens.astype(np.int64), logprobs.astype(np.float32), bool(numbers[start + 1]))
        start += 2 + 2 * length


@dataclass(frozen=True)
class OneVerdict:
    """A grader whose verdicts are those of the first process: a limit on time may fall otherwise in another."""

    grader: Grader
    processes: Processes

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each response is right."""
        verdicts = self.grader.grade(responses, answers) if self.processes.first else [False] * len(responses)
        return [bool(right) for right in self.processes.gather(verdicts)[0]]


class Replica:
    """A whole copy of a sharded model in each process, to sample from: responses end at their own time in each.

    Linear layers are kept in the type that autocast would turn them into for every token, so that samples and their
    log-probabilities are those of the sharded model.

    Args:
        sharded: the model that is trained.
        blank: the same without weights; it is filled.
    """

    def __init__(
        self, sharded: torch.nn.Module, blank: torch.nn.Module, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        self._sharded, self._model = sharded, blank
        moving = ".lora_" if any(".lora_" in name for name, _ in sharded.named_parameters()) else ""
        self._moving: list[tuple[torch.Tensor, torch.Tensor]] = []
        # A tied weight is two here: of one type in the embedding, of another in the unembedding.
        for name, parameter in sharded.named_parameters(remove_duplicate=False):
            layer, _, own = name.rpartition(".")
            module = blank.get_submodule(layer)
            dtype = autocast if isinstance(module, torch.nn.Linear) else None
            weight = whole(parameter.detach()).to(device=device, dtype=dtype, copy=True)
            copied = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, own, copied)
            if moving in name:
                self._moving.append((parameter, copied))
        blank.to(device)

    @torch.no_grad()
    def refreshed(self) -> torch.nn.Module:
        """The copy with the weights that the model has now. Called in every process."""
        for parameter, copied in self._moving:
            copied.copy_(whole(parameter.detach()))
        return self._model
