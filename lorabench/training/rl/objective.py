"""The objective (paper, section on RL): the sum over tokens of p_learner / p_sampler times the advantage.

The advantage of a response is its reward minus the mean reward of its group; it is not divided by the standard
deviation. There is no KL term, no clipping, no entropy bonus. The loss is the mean over responses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorabench.errors import UserError
from lorabench.models.lanes import Rows, Stack
from lorabench.models.last_layer import read_at, unwrapped
from lorabench.training.distributed import ALONE, Processes, enter
from lorabench.training.rl.sampler import Response, window

# Responses share a row with their prompt: any number up to the short limit, a few up to the long one.
_SHORT_ROW, _LONG_ROW, _RESPONSES = 192, 2048, 4


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, or some of them, with numbers of each, all (n,)."""

    prompt: tuple[int, ...]
    responses: list[Response]
    rewards: np.ndarray
    advantages: np.ndarray
    times: np.ndarray
    """How often it was drawn, as far as equal ones are one."""

    @classmethod
    def of(cls, prompt: tuple[int, ...], responses: list[Response], rewards: np.ndarray) -> Group:
        """A whole group: advantages are rewards minus their mean."""
        return cls(prompt, responses, rewards, rewards - rewards.mean(), np.ones(len(responses)))

    @property
    def equal(self) -> bool:
        """Whether all rewards are equal, so that there is nothing to learn."""
        return bool((self.rewards == self.rewards[0]).all())

    def part(self, rows: list[int]) -> Group:
        """Some of the responses, with the advantages that they have in the whole group."""
        responses = [self.responses[row] for row in rows]
        return Group(self.prompt, responses, self.rewards[rows], self.advantages[rows], self.times[rows])

    def distinct(self) -> Group:
        """The group with equal responses as one: short answers are often drawn again, and teach the same."""
        seen: dict[tuple[bytes, bytes, float], int] = {}
        first = [
            seen.setdefault((response.tokens.tobytes(), response.logprobs.tobytes(), reward), row)
            for row, (response, reward) in enumerate(zip(self.responses, self.rewards, strict=True))
        ]
        rows = list(seen.values())
        times = np.bincount(first, self.times, len(first))[rows]
        return replace(self.part(rows), times=times)


# What a process computes that has nothing to do, while others have.
_NOTHING = Group.of((0,), [Response(np.zeros(1, np.int64), np.zeros(1, np.float32), False)], np.zeros(1))


@dataclass(frozen=True)
class Step:
    """Measures of one step's batch before its update, over all response tokens."""

    tokens: int
    loss: float
    entropy: float
    """Of the learner's distribution, nats per token."""
    kl: float
    """KL(sampler || learner), nats per token, estimated as the mean of log p_sampler - log p_learner."""
    ratio_mean: float
    ratio_max: float


def backward(
    stack: Stack,
    batches: Sequence[Sequence[Group]],
    max_tokens: int,
    autocast: torch.dtype | None = None,
    processes: Processes = ALONE,
) -> list[Step]:
    """Add the gradient of each lane's loss to its weights; returns what was measured on the way, for each lane.

    Groups of equal rewards add nothing to the gradient and are only measured, unless a lane has no others.

    Args:
        batches: the whole batch of a step of each lane; each process computes a share of it.
        max_tokens: limit of tokens, padding included, that go through the model at once.
    """
    device = next(stack.model.parameters()).device
    lanes = len(batches)
    episodes = [sum(len(group.responses) for group in groups) for groups in batches]
    teaching = [[group for group in groups if not group.equal] or list(groups) for groups in batches]
    idle = [
        [group for group in groups if group.equal] if len(learned) < len(groups) else []
        for groups, learned in zip(batches, teaching, strict=True)
    ]
    sums, ratio_max = torch.zeros((lanes, 5), dtype=torch.float64), [0.0] * lanes
    nothing: tuple[list[Group], ...] = ([],) * lanes
    for some, learn in ((teaching, True), (idle, False)):
        split = (parts(groups, max_tokens // lanes, processes) for groups in some)
        for part in processes.even(zip_longest(*split, fillvalue=[]), nothing):
            idling = not any(part)
            part = ([_NOTHING], *part[1:]) if idling else part
            rows = [row for of_lane in part for row in of_lane]
            check_window(unwrapped(stack.model), rows)
            layout = _Layout.of(rows)
            # Around the backward pass too: layers whose activations are computed again ask for all of this again.
            with (
                stack.rows.are([len(of_lane) for of_lane in part]),
                _read(stack, layout, device),
                torch.set_grad_enabled(learn),
            ):
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    learner, entropy, mask = enter(stack.model, response_logprobs, layout, stack.rows)
                if idling:
                    if learn:
                        (0.0 * learner.sum()).backward()
                    continue
                sampler, advantages, times = _padded(rows, mask)
                difference = torch.where(mask, learner - sampler, 0.0)
                ratio = difference.exp()
                each = -times * torch.where(mask, ratio * advantages[:, None], 0.0)
                counts = [sum(len(row.responses) for row in of_lane) for of_lane in part]
                losses = [own.sum() / n for own, n in zip(each.split(counts), episodes, strict=True)]
                if learn:
                    torch.stack(losses).sum().backward()
            with torch.no_grad():
                split_by_lane = (tensor.split(counts) for tensor in (mask, times, entropy, difference, ratio))
                for lane, (there, often, *measures) in enumerate(zip(*split_by_lane, strict=True)):
                    if not counts[lane]:
                        continue
                    spread, apart, ratios = ((often * measure).sum() for measure in measures)
                    sums[lane] += torch.stack([often.sum(), losses[lane], spread, -apart, ratios]).double().cpu()
                    ratio_max[lane] = max(ratio_max[lane], measures[-1][there].max().item())
    found = []
    for own, largest in zip(sums, ratio_max, strict=True):
        tokens, loss_sum, *others = processes.gather(own.numpy()).sum(0).tolist()
        entropy_mean, kl, ratio_mean = (value / tokens for value in others)
        found.append(Step(int(tokens), loss_sum, entropy_mean, kl, ratio_mean, processes.most(largest)))
    return found


def _read(stack: Stack, layout: _Layout, device: torch.device) -> AbstractContextManager[None]:
    """Within, only what predicts tokens of responses is computed to the end."""
    tokens = np.unique(layout.sources)
    return read_at(stack.model, torch.from_numpy(tokens).to(device), stack.rows, layout.by_lane(tokens, stack.rows))


def parts(groups: Sequence[Group], max_tokens: int, processes: Processes = ALONE) -> Iterator[list[Group]]:
    """Split a batch into rows and these into parts of little padding that fit `max_tokens`; one row always fits.

    A row is a prompt with some of its responses, a group as far as it goes through the model as one sequence; equal
    responses are one. Each of several processes has its share of the rows.
    """
    rows = [row for group in groups for row in _rows(group.distinct(), max_tokens)]
    rows = [rows[place] for place in processes.share(np.array([_length(row) for row in rows]))]
    part: list[Group] = []
    for row in rows:
        if part and (len(part) + 1) * _length(row) > max_tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _rows(group: Group, max_tokens: int) -> Iterator[Group]:
    """Fill rows with responses. A prompt is shared, but attention reaches over the whole row, so it has a limit."""
    longest = len(group.prompt) + max(len(response.tokens) for response in group.responses)
    limit = min(max_tokens, max(_SHORT_ROW, longest, min(_LONG_ROW, _RESPONSES * longest)))
    row, length = [0], len(group.prompt) + len(group.responses[0].tokens)
    for index, response in enumerate(group.responses[1:], 1):
        if length + len(response.tokens) > limit:
            yield group.part(row)
            row, length = [], len(group.prompt)
        row.append(index)
        length += len(response.tokens)
    yield group.part(row)


def _length(row: Group) -> int:
    """Tokens of a row. The last token of a response is predicted but not read."""
    return len(row.prompt) + sum(len(response.tokens) - 1 for response in row.responses)


class _Layout(NamedTuple):
    """Rows as sequences: a prompt, then its responses, each of which sees the prompt and itself and has the positions
    that it would have alone."""

    ids: np.ndarray
    """(rows, length)."""
    positions: np.ndarray
    """(rows, length)."""
    segments: np.ndarray
    """(rows, length): 0 in the prompt, else the number of the response; padding has one of its own, -1."""
    sources: np.ndarray
    """Places in (rows x length) that predict the tokens of responses, response by response."""
    targets: np.ndarray
    """Those tokens."""
    there: np.ndarray
    """(responses, longest response): where there is a token."""

    @classmethod
    def of(cls, rows: Sequence[Group]) -> _Layout:
        width = max(map(_length, rows))
        ids, places, segments = (np.zeros((len(rows), width), np.int64) for _ in range(3))
        segments -= 1
        responses = [response.tokens for row in rows for response in row.responses]
        there = np.zeros((len(responses), max(map(len, responses))), np.bool_)
        sources = []
        number = 0
        for index, row in enumerate(rows):
            prompt = len(row.prompt)
            ids[index, :prompt], places[index, :prompt], segments[index, :prompt] = row.prompt, np.arange(prompt), 0
            start = prompt
            for segment, response in enumerate(row.responses, 1):
                own = slice(start, start + len(response.tokens) - 1)
                ids[index, own], segments[index, own] = response.tokens[:-1], segment
                places[index, own] = np.arange(prompt, prompt + len(response.tokens) - 1)
                # The prompt's last token predicts the first of every response.
                sources.append(index * width + np.concatenate([[prompt - 1], np.arange(own.start, own.stop)]))
                there[number, : len(response.tokens)] = True
                number, start = number + 1, own.stop
        return cls(ids, places, segments, np.concatenate(sources), np.concatenate(responses), there)

    def by_lane(self, tokens: np.ndarray, dealt: Rows) -> list[int]:
        """How many of these places, of ascending rows, are each lane's."""
        ends = np.cumsum(dealt.counts)
        counts: list[int] = np.diff(np.searchsorted(tokens // self.ids.shape[1], ends), prepend=0).tolist()
        return counts


def check_window(model: torch.nn.Module, rows: Sequence[Group]) -> None:
    """Refuse rows that are longer than the model's layers see.

    Raises:
        UserError: a prompt with a response is longer than a window of sliding attention.
    """
    within = window(model)
    longest = max(len(row.prompt) + len(response.tokens) for row in rows for response in row.responses)
    if within is not None and longest > within:
        raise UserError(
            f"{type(model).__name__} has sliding attention over {within} tokens, and a prompt with its response has "
            f"{longest}; in RL both must be within that: lower max_new_tokens or drop long problems"
        )


def response_logprobs(model: torch.nn.Module, layout: _Layout, dealt: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of every response token, with gradient; entropy there, without; where there is a token.

    All three results are (responses, longest response).

    Args:
        dealt: how many of the rows are each lane's.
    """
    base = unwrapped(model)
    device = next(base.parameters()).device
    ids, places, segments, source, targets, there = (torch.from_numpy(part).to(device) for part in layout)
    seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
    hidden = base.get_decoder()(
        input_ids=ids, position_ids=places, attention_mask=seen.tril()[:, None], use_cache=False
    ).last_hidden_state
    # The unembedding has response tokens in front of it instead of rows.
    with dealt.are(layout.by_lane(layout.sources, dealt)):
        logits = base.get_output_embeddings()(hidden.flatten(0, 1)[source])
    distribution = torch.log_softmax(logits.float(), -1)
    chosen = distribution.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(-1)
    empty = torch.zeros(there.shape, device=device)
    return empty.masked_scatter(there, chosen), empty.masked_scatter(there, entropy), there


def _padded(groups: Sequence[Group], mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sampler's log-probabilities, (responses, longest), advantages, (responses,), and how often each token was
    drawn, (responses, longest), 0 where none is."""
    sampler = np.zeros(mask.shape, np.float32)
    for row, response in enumerate(response for group in groups for response in group.responses):
        sampler[row, : len(response.tokens)] = response.logprobs
    advantages, times = (
        torch.from_numpy(np.concatenate(numbers).astype(np.float32)).to(mask.device)
        for numbers in ([group.advantages for group in groups], [group.times for group in groups])
    )
    return torch.from_numpy(sampler).to(mask.device), advantages, torch.where(mask, times[:, None], 0.0)
