"""The objective (paper, section on RL): the sum over tokens of p_learner / p_sampler times the advantage.

The advantage of a response is its reward minus the mean reward of its group; it is not divided by the standard
deviation. There is no KL term, no clipping, no entropy bonus. The loss is the mean over responses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from lorabench.training.rl.sampler import Response, left_padded, positions

# A split by response length must save a tenth of the tokens; it is tried at these quantiles of the lengths.
_WORTH_SPLITTING = 0.9
_SPLITS = np.linspace(0.1, 0.95, 12)


@dataclass(frozen=True)
class Group:
    """The responses to one prompt, or some of them, with the reward and the advantage of each, both (n,)."""

    prompt: tuple[int, ...]
    responses: list[Response]
    rewards: np.ndarray
    advantages: np.ndarray

    @classmethod
    def of(cls, prompt: tuple[int, ...], responses: list[Response], rewards: np.ndarray) -> Group:
        """A whole group: advantages are rewards minus their mean."""
        return cls(prompt, responses, rewards, rewards - rewards.mean())

    @property
    def equal(self) -> bool:
        """Whether all rewards are equal, so that there is nothing to learn."""
        return bool((self.rewards == self.rewards[0]).all())

    def part(self, rows: list[int]) -> Group:
        """Some of the responses, with the advantages that they have in the whole group."""
        return Group(self.prompt, [self.responses[row] for row in rows], self.rewards[rows], self.advantages[rows])


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
    model: torch.nn.Module, groups: Sequence[Group], max_tokens: int, autocast: torch.dtype | None = None
) -> Step:
    """Add the gradient of the loss to the parameters; returns what was measured on the way.

    Groups of equal rewards add nothing to the gradient and are only measured, unless there are no others.

    Args:
        groups: the whole batch of a step.
        max_tokens: limit of tokens, padding included, that go through the model at once.
    """
    device = next(model.parameters()).device
    episodes = sum(len(group.responses) for group in groups)
    teaching = [group for group in groups if not group.equal] or list(groups)
    idle = [group for group in groups if group.equal] if len(teaching) < len(groups) else []
    sums, ratio_max = torch.zeros(5, dtype=torch.float64), 0.0
    for some, learn in ((teaching, True), (idle, False)):
        for part in parts(some, max_tokens):
            with (
                torch.set_grad_enabled(learn),
                torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
            ):
                learner, entropy, mask = response_logprobs(model, part, device)
            sampler, advantages = _padded(part, mask)
            difference = torch.where(mask, learner - sampler, 0.0)
            ratio = difference.exp()
            loss = -(ratio * advantages[:, None])[mask].sum() / episodes
            if learn:
                loss.backward()
            with torch.no_grad():
                measured = [mask.sum(), loss, entropy[mask].sum(), -difference.sum(), ratio[mask].sum()]
                sums += torch.stack([value.double() for value in measured]).cpu()
                ratio_max = max(ratio_max, ratio[mask].max().item())
    tokens, loss_sum, *others = sums.tolist()
    entropy_mean, kl, ratio_mean = (value / tokens for value in others)
    return Step(int(tokens), loss_sum, entropy_mean, kl, ratio_mean, ratio_max)


def parts(groups: Sequence[Group], max_tokens: int) -> Iterator[list[Group]]:
    """Split a batch into parts of little padding that fit `max_tokens`; groups are split as that needs.

    One response with its prompt always fits.
    """
    for alike in _alike(list(groups)):
        part: list[Group] = []
        for piece in sorted(_pieces(alike, max_tokens), key=lambda piece: len(piece.prompt)):
            if part and _padded_tokens([*part, piece]) > max_tokens:
                yield part
                part = []
            part.append(piece)
        if part:
            yield part


def _alike(groups: list[Group]) -> Iterator[list[Group]]:
    """Split by response length where that saves tokens: a few long responses would pad all others to their length."""
    lengths = np.array([len(response.tokens) for group in groups for response in group.responses])
    whole = _padded_tokens(groups) if groups else 0
    best, best_tokens = None, _WORTH_SPLITTING * whole
    for limit in np.unique(np.quantile(lengths, _SPLITS, method="lower")) if groups else ():
        short, long = _of_length(groups, 0, limit), _of_length(groups, limit, math.inf)
        if long and (tokens := _padded_tokens(short) + _padded_tokens(long)) < best_tokens:
            best, best_tokens = (short, long), tokens
    if best:
        for half in best:
            yield from _alike(half)
    elif groups:
        yield groups


def _of_length(groups: list[Group], above: float, limit: float) -> list[Group]:
    """The groups with those of their responses that are longer than `above`, up to `limit`; without empty ones."""
    chosen = [
        group.part([row for row, response in enumerate(group.responses) if above < len(response.tokens) <= limit])
        for group in groups
    ]
    return [group for group in chosen if group.responses]


def _pieces(groups: Sequence[Group], max_tokens: int) -> Iterator[Group]:
    for group in groups:
        longest = max(len(response.tokens) for response in group.responses)
        count = max(1, (max_tokens - len(group.prompt)) // longest)
        rows = list(range(len(group.responses)))
        for start in range(0, len(rows), count):
            yield group.part(rows[start : start + count])


def _padded_tokens(groups: Sequence[Group]) -> int:
    """Tokens, padding included, of prompts and responses; the last of a response is predicted but not read."""
    prompts = len(groups) * max(len(group.prompt) for group in groups)
    longest = max(len(response.tokens) for group in groups for response in group.responses)
    return prompts + (longest - 1) * sum(len(group.responses) for group in groups)


def response_logprobs(
    model: torch.nn.Module, groups: Sequence[Group], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of every response token, with gradient; entropy there, without; where there is a token.

    A prompt goes through the model once for all its responses: they continue its keys and values, through which
    their gradient flows back. All three are (responses, longest response).
    """
    from transformers import DynamicCache

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    responses = [response.tokens for group in groups for response in group.responses]
    width = max(map(len, responses))
    ids, mask = (np.zeros((len(responses), width), np.int64) for _ in range(2))
    for row, tokens in enumerate(responses):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    targets, there = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    prompts, prompt_mask = left_padded([group.prompt for group in groups], device)
    cache = DynamicCache()
    hidden = decoder(
        input_ids=prompts,
        attention_mask=prompt_mask,
        position_ids=positions(prompt_mask),
        cache=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]
    sizes = torch.tensor([len(group.responses) for group in groups], device=device)
    source = torch.arange(len(groups), device=device).repeat_interleave(sizes)
    hidden = hidden[source]
    if width > 1:
        cache.batch_select_indices(source)
        whole = torch.cat([prompt_mask[source], there[:, :-1]], dim=-1)
        follow = decoder(
            input_ids=targets[:, :-1],
            attention_mask=whole,
            position_ids=positions(whole)[:, prompts.shape[1] :],
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        hidden = torch.cat([hidden, follow], dim=1)

    scored = there.bool()
    distribution = torch.log_softmax(head(hidden[scored]).float(), -1)
    chosen = distribution.gather(-1, targets[scored][:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(-1)
    empty = torch.zeros(scored.shape, device=device)
    return empty.masked_scatter(scored, chosen), empty.masked_scatter(scored, entropy), scored


def _padded(groups: Sequence[Group], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sampler's log-probabilities, (responses, longest), and the advantages, (responses,)."""
    sampler = np.zeros(mask.shape, np.float32)
    for row, response in enumerate(response for group in groups for response in group.responses):
        sampler[row, : len(response.tokens)] = response.logprobs
    advantages = np.concatenate([group.advantages for group in groups]).astype(np.float32)
    return torch.from_numpy(sampler).to(mask.device), torch.from_numpy(advantages).to(mask.device)
