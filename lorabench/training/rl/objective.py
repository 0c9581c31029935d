"""The objective of the paper's section on RL: the sum over tokens of p_learner / p_sampler times the advantage.

The advantage of a response is its reward minus the mean reward of its group, without division by the standard
deviation. There is no KL term, no clipping and no entropy bonus. The loss is the mean over responses.

A row is one sequence with a prompt and some of its responses, each of which attends to the prompt and to itself. A long
response has a row of its own, with plain causal attention. Where sequences share rows without a mask
(`lorabench.models.fused`), all prompts and responses of a part are in one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorabench.errors import UserError
from lorabench.models import fused
from lorabench.models.passes import computing_only, without_peft
from lorabench.planning.flops import SHARED_ROW, row_limit
from lorabench.training.distributed import SINGLE_PROCESS, Processes, call_as_forward
from lorabench.training.loss import MAX_LOGITS, backward_in_pieces, of_tokens, packed_batches, share_rows
from lorabench.training.rl.sampler import Request, Response, packed
from lorabench.training.run import Machine


@dataclass(frozen=True)
class ResponseGroup:
    """Some or all responses to one prompt, with the reward, advantage and count of each, all (n,)."""

    prompt: tuple[int, ...]
    responses: list[Response]
    rewards: np.ndarray
    advantages: np.ndarray
    times: np.ndarray
    """How often a response was drawn, where equal responses are merged."""

    @classmethod
    def of(cls, prompt: tuple[int, ...], responses: list[Response], rewards: np.ndarray) -> ResponseGroup:
        """Make a whole group; advantages are rewards minus their mean."""
        return cls(prompt, responses, rewards, rewards - rewards.mean(), np.ones(len(responses)))

    @property
    def equal(self) -> bool:
        """Whether all rewards are equal, so that all advantages are zero."""
        return bool((self.rewards == self.rewards[0]).all())

    def part(self, rows: list[int]) -> ResponseGroup:
        """Return a group of some of the responses, with the advantages that they have in the whole group."""
        arrays = (array[rows] for array in (self.rewards, self.advantages, self.times))
        return ResponseGroup(self.prompt, [self.responses[row] for row in rows], *arrays)


# What a process without any row computes while other processes have rows.
_NOTHING = ResponseGroup.of((0,), [Response(np.zeros(1, np.int64), np.zeros(1, np.float32), False)], np.zeros(1))


@dataclass(frozen=True)
class StepMeasures:
    """Measures of the batch of one step before its update, over all response tokens."""

    tokens: int
    loss: float
    entropy: float
    """Entropy of the learner's distribution, nats per token."""
    kl: float
    """KL(sampler || learner), nats per token, estimated as the mean of log p_sampler - log p_learner."""
    ratio_mean: float
    """Mean ratio of the learner's to the sampler's probability of a token."""
    ratio_max: float
    ratio_above_2: float
    """Share of tokens whose ratio is above 2."""


def backward(model: torch.nn.Module, groups: Sequence[ResponseGroup], machine: Machine) -> StepMeasures:
    """Add the gradient of the loss to the model's weights, and return the measures of the batch.

    Groups of equal rewards add nothing to the gradient and are only measured, unless there are no other groups. Each
    process computes a share.
    """
    processes, one_row = machine.processes, share_rows(model, machine)
    episodes = sum(len(group.responses) for group in groups)
    teaching = [group for group in groups if not group.equal] or list(groups)
    idle = [group for group in groups if group.equal] if len(teaching) < len(groups) else []
    # Weight of the tokens, loss, and the sums of entropy, KL, ratio and ratios above 2.
    sums, ratio_max = torch.zeros(6, dtype=torch.float64), 0.0
    for some, learn in ((teaching, True), (idle, False)):
        for part in processes.even(row_parts(some, machine.max_batch_tokens, processes, one_row), []):
            layout = _Layout.of(part or [_NOTHING], machine, one_row)
            loss, learner, entropy = _compute(model, layout, episodes, machine, learn)
            if not part:
                continue
            difference = learner - layout.sampler
            ratio = difference.exp()
            # Numbers of tokens are added by response, whatever the parts of the loss are.
            by_response = torch.zeros(layout.is_token.shape, device=machine.device)
            count, *others = (
                by_response.masked_scatter(layout.is_token, layout.times * measure).sum()
                for measure in (torch.ones_like(ratio), entropy, -difference, ratio, ratio > 2)
            )
            sums += torch.stack([count, loss, *others]).double().cpu()
            ratio_max = max(ratio_max, ratio.max().item())
    tokens, loss_sum, *others = processes.gather(sums.numpy()).sum(0).tolist()
    entropy_mean, kl, ratio_mean, above_2 = (value / tokens for value in others)
    ratio_max = float(processes.gather([ratio_max]).max())
    return StepMeasures(int(tokens), loss_sum, entropy_mean, kl, ratio_mean, ratio_max, above_2)


def check_finite(
    model: torch.nn.Module, requests: Sequence[Request], responses: Sequence[Response], machine: Machine
) -> None:
    """Raise UserError if a response has log-probabilities that are not finite where the learner has finite ones.

    A loss that is not finite would say that the run diverged, whose policy may be sound. Every process must call this.
    """
    for request, response in zip(requests, responses, strict=True):
        if np.isfinite(response.logprobs).all():
            continue
        group = ResponseGroup.of(request.prompt, [response], np.zeros(1))
        layout = _Layout.of([group], machine, share_rows(model, machine))
        if bool(_compute(model, layout, 1, machine, learn=False)[1].isfinite().all()):
            place, length = int((~np.isfinite(response.logprobs)).argmax()), len(request.prompt)
            raise UserError(
                f"the sampler (execution.sampler) gives token {place + 1} of a response to a prompt of {length} tokens "
                f"the log-probability {response.logprobs[place]:g}, and the learner a finite one: it computes wrongly "
                "on this machine, as lorabench doctor may show; the same command goes on from the checkpoints"
            )
        return


def row_parts(
    groups: Sequence[ResponseGroup], max_tokens: int, processes: Processes = SINGLE_PROCESS, one_row: bool = False
) -> Iterator[list[ResponseGroup]]:
    """Split groups into rows, and this process's share of the rows into parts with little padding.

    A part has at most `max_tokens` tokens, padding included, unless it is a single row. With `one_row` there is no
    padding, and rows may be as long.
    """
    rows = [row for group in groups for row in _rows(group, max_tokens, one_row)]
    lengths = np.array([_length(row) for row in rows])
    share = processes.share(lengths)
    if one_row:
        yield from ([rows[index] for index in share[part]] for part in packed_batches(lengths[share], max_tokens))
        return
    # Rows with a mask and rows without are not computed together.
    for some in (share[lengths[share] <= SHARED_ROW], share[lengths[share] > SHARED_ROW]):
        yield from packed([rows[index] for index in some], _length, max_tokens)


def _rows(group: ResponseGroup, max_tokens: int, one_row: bool) -> Iterator[ResponseGroup]:
    """Fill rows with the distinct responses, up to the limit of shared rows; a longer one has a row of its own."""
    # Short answers are often drawn several times.
    seen: dict[tuple[bytes, bytes, float], int] = {}
    first = [
        seen.setdefault((response.tokens.tobytes(), response.logprobs.tobytes(), reward), place)
        for place, (response, reward) in enumerate(zip(group.responses, group.rewards, strict=True))
    ]
    distinct = list(seen.values())
    group = replace(group.part(distinct), times=np.bincount(first, group.times, len(first))[distinct])
    if not one_row:
        max_tokens = row_limit(
            len(group.prompt) + max(len(response.tokens) for response in group.responses), max_tokens
        )
    row, length = [0], len(group.prompt) + len(group.responses[0].tokens)
    for index, response in enumerate(group.responses[1:], 1):
        if length + len(response.tokens) > max_tokens:
            yield group.part(row)
            row, length = [], len(group.prompt)
        row.append(index)
        length += len(response.tokens)
    yield group.part(row)


def _length(row: ResponseGroup) -> int:
    """Return the tokens of a row; the last token of a response is predicted but is no input."""
    return len(row.prompt) + sum(len(response.tokens) - 1 for response in row.responses)


class _Layout(NamedTuple):
    """Rows as token sequences: a prompt, then its responses, each with the positions that it would have alone."""

    of_model: dict[str, Any]
    """The arguments of a model's forward pass, with token ids (rows, length)."""
    is_token: Tensor
    """Whether a response has a token there, (responses, longest response)."""
    sources: Tensor
    """Indices into (rows x length) of the positions that predict the tokens of responses, response by response."""
    targets: Tensor
    """The tokens that `sources` predict, (tokens,)."""
    sampler: Tensor
    """The sampler's log-probabilities of the targets in nats, (tokens,)."""
    advantages: Tensor
    """The advantages of the responses of the targets, (tokens,)."""
    times: Tensor
    """How often the responses of the targets were drawn, (tokens,)."""

    @classmethod
    def of(cls, rows: Sequence[ResponseGroup], machine: Machine, one_row: bool) -> _Layout:
        """Return the layout of rows, padded or in one row, on the machine's device."""
        lengths = list(map(_length, rows))
        shape = (1, sum(lengths)) if one_row else (len(rows), max(lengths))
        starts = accumulate(lengths, initial=0) if one_row else range(0, shape[0] * shape[1], shape[1])
        # A segment is 0 in the prompt, from 1 the number of the response, -1 in padding.
        ids, positions, segments = (np.full(shape[0] * shape[1], fill) for fill in (0, 0, -1))
        responses = [response for row in rows for response in row.responses]
        tokens = [response.tokens for response in responses]
        is_token = np.arange(max(map(len, tokens))) < np.array([[len(ids)] for ids in tokens])
        sources = []
        for first, row in zip(starts, rows, strict=False):
            prompt, start = len(row.prompt), first + len(row.prompt)
            ids[first:start], positions[first:start], segments[first:start] = row.prompt, np.arange(prompt), 0
            for segment, response in enumerate(row.responses, 1):
                own = slice(start, start + len(response.tokens) - 1)
                ids[own], segments[own] = response.tokens[:-1], segment
                positions[own] = np.arange(prompt, prompt + len(response.tokens) - 1)
                # The prompt's last token predicts the first of every response.
                sources.append(np.concatenate([[first + prompt - 1], np.arange(own.start, own.stop)]))
                start = own.stop
        by_token = [
            np.repeat(np.concatenate(numbers), is_token.sum(1)).astype(np.float32)
            for numbers in ([row.advantages for row in rows], [row.times for row in rows])
        ]
        sampler = np.concatenate([response.logprobs for response in responses]).astype(np.float32)
        in_rows = (array.reshape(shape) for array in (ids, positions, segments))
        arrays = (*in_rows, is_token, np.concatenate(sources), np.concatenate(tokens), sampler, *by_token)
        whole, places, segment_of, *tensors = (torch.as_tensor(array, device=machine.device) for array in arrays)
        of_model = {"input_ids": whole}
        if one_row:
            sequences = [(len(row.prompt), [len(response.tokens) - 1 for response in row.responses]) for row in rows]
            of_model |= fused.shared_row(sequences, machine.device)
        elif shape[1] <= SHARED_ROW:
            visible = (segment_of[:, None, :] == segment_of[:, :, None]) | (segment_of[:, None, :] == 0)
            # PyTorch would convert booleans in each layer, and keep each result for the backward pass.
            mask = torch.zeros(visible.shape, dtype=machine.autocast, device=machine.device)[:, None]
            mask.masked_fill_(~visible.tril()[:, None], -math.inf)
            of_model |= {"position_ids": places, "attention_mask": mask}
        return cls(of_model, *tensors)


def _compute(
    model: torch.nn.Module, layout: _Layout, episodes: int, machine: Machine, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of some rows, and the log-probability and entropy of each target in nats.

    With `learn` the gradient is added to the model's weights.
    """
    at_once = max(1, MAX_LOGITS[machine.device.type] // without_peft(model).config.vocab_size)

    def logprobs_and_entropies(logits: Tensor, piece: slice) -> Tensor:
        if fused.is_fused(model):
            return torch.stack(fused.logprobs_and_entropies(logits, layout.targets[piece]), -1)
        distribution = torch.log_softmax(logits.float(), -1)
        chosen = distribution.gather(-1, layout.targets[piece, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(distribution.exp() * distribution).sum(-1)
        return torch.stack([chosen, entropy], -1)

    def loss(numbers: Tensor, piece: slice) -> Tensor:
        ratio = (numbers[:, 0] - layout.sampler[piece]).exp()
        return (-layout.times[piece] * (ratio * layout.advantages[piece])).sum() / episodes

    # The context includes the backward pass, since recomputed layers read the tokens again.
    with computing_only(model, layout.sources.unique()):
        if learn:
            total, numbers = backward_in_pieces(
                model, layout.of_model, layout.sources, logprobs_and_entropies, loss, machine.autocast, at_once
            )
        else:
            with torch.no_grad(), machine.cast():
                numbers = call_as_forward(
                    model, of_tokens, layout.of_model, layout.sources, logprobs_and_entropies, at_once
                )
            total = loss(numbers, slice(None))
    return total, numbers[:, 0], numbers[:, 1]
