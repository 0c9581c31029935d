"""Sampling with a KV cache, batched over problems, groups and lanes.

Every response has random numbers of its own, which follow from a key and nothing else, so it is the same in any
batch (but for rounding, where a draw falls on the border of two tokens). Token ids and log-probabilities are taken
here, where a token is drawn, and are never made from text again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorabench.models.lanes import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Finished rows are dropped from the cache once they are this share of it: dropping copies the rest.
_DROP_AT = 0.25


@dataclass(frozen=True)
class Request:
    """One response wanted. Without a key it is greedy; `lane` names the run whose policy answers, None the only one."""

    prompt: tuple[int, ...]
    key: tuple[int, ...] | None
    lane: str | None = None


@dataclass(frozen=True)
class Response:
    """Tokens, the stop token included, and the log-probability (nats) that each was drawn with, both (length,)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    truncated: bool


@dataclass(frozen=True)
class Stop:
    """What ends a response: a token, a text, or the number of tokens."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    texts: tuple[str, ...] = ()


@torch.no_grad()
def sample(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    stop: Stop,
    max_cache_tokens: int,
    autocast: torch.dtype | None = None,
) -> list[Response]:
    """Draw a response to each request, at temperature 1 from all tokens.

    Args:
        stack: a causal LM, with one lane or with those that the requests name.
        max_cache_tokens: limit of rows times prompt and response length in one batch; one row always fits.

    Returns:
        The responses, in the order of the requests.
    """
    model = stack.model
    was_training = model.training
    # A model that is trained with recomputed activations would keep no cache.
    model.eval()
    found: dict[int, Response] = {}
    device = next(model.parameters()).device
    place: dict[str | None, int] = {name: index for index, name in enumerate(stack.lanes)}
    lanes = [place[request.lane] if len(place) > 1 else 0 for request in requests]
    try:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            for chunk in _chunks(requests, stop, max_cache_tokens):
                # The rows of a lane lie side by side.
                chunk.sort(key=lambda index: lanes[index])
                chosen = [requests[index] for index in chunk]
                rows = _sample_chunk(stack, tokenizer, chosen, [lanes[index] for index in chunk], stop, device)
                found.update(zip(chunk, rows, strict=True))
    finally:
        model.train(was_training)
    return [found[index] for index in range(len(requests))]


def uniforms(key: tuple[int, ...], count: int) -> np.ndarray:
    """The random numbers in [0, 1) that belong to a key, (count,); the first ones do not depend on `count`."""
    return np.random.default_rng(key).random(count)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of several lengths as token ids and attention mask, both (n, longest), padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids, mask = (np.zeros((len(prompts), width), np.int64) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def positions(mask: Tensor) -> Tensor:
    """Position of each token from a mask that is 0 on padding; padding gets 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Tokens by inversion of the distribution function, (n,).

    Args:
        logprobs: (n, vocabulary).
        uniform: (n,) in [0, 1), double precision; negative takes the most likely token.
    """
    cumulated = logprobs.double().exp().cumsum(-1)
    # The sum is 1 but for rounding; scaled to it, no token of probability zero is ever drawn.
    drawn = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True).squeeze(-1)
    drawn = drawn.clamp(max=logprobs.shape[-1] - 1)
    return torch.where(uniform < 0, logprobs.argmax(-1), drawn)


def _chunks(requests: Sequence[Request], stop: Stop, max_cache_tokens: int) -> Iterator[list[int]]:
    """Indices of requests that are sampled together, of similar prompt length, those of one prompt side by side."""
    ordered = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt), requests[index].prompt))
    chunk: list[int] = []
    for index in ordered:
        length = len(requests[index].prompt) + stop.max_new_tokens
        if chunk and (len(chunk) + 1) * length > max_cache_tokens:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _sample_chunk(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    lanes: list[int],
    stop: Stop,
    device: torch.device,
) -> list[Response]:
    from lorabench.training.rl.cache import growing_cache

    n = len(requests)
    chance = np.full((n, stop.max_new_tokens), -1.0)
    for row, request in enumerate(requests):
        if request.key is not None:
            chance[row] = uniforms(request.key, stop.max_new_tokens)
    uniform = torch.from_numpy(chance).to(device)
    stops = torch.tensor(stop.tokens, dtype=torch.long, device=device)
    tokens = torch.zeros((n, stop.max_new_tokens), dtype=torch.long, device=device)
    logprobs = torch.zeros((n, stop.max_new_tokens), device=device)
    lengths = torch.full((n,), stop.max_new_tokens, device=device)
    stopped = torch.zeros(n, dtype=torch.bool, device=device)

    # A prompt goes through the model once, however many responses it gets.
    asked = [(lane, request.prompt) for lane, request in zip(lanes, requests, strict=True)]
    unique = list(dict.fromkeys(asked))
    ids, mask = left_padded([prompt for _, prompt in unique], device)
    cache = growing_cache()
    logits = _next_logits(stack, ids, mask, positions(mask), cache, [lane for lane, _ in unique])
    place = {prompt: index for index, prompt in enumerate(unique)}
    source = torch.tensor([place[one] for one in asked], device=device)
    cache.batch_select_indices(source)
    mask, logits = mask[source], logits[source]
    rows = torch.arange(n, device=device)  # the request that each row of the cache belongs to

    for step in range(stop.max_new_tokens):
        distribution = torch.log_softmax(logits.float(), -1)
        drawn = draw(distribution, uniform[rows, step])
        tokens[rows, step] = drawn
        logprobs[rows, step] = distribution.gather(-1, drawn[:, None]).squeeze(-1)
        ended = torch.isin(drawn, stops)
        if stop.texts:
            ended |= _has_text(tokenizer, tokens[rows, : step + 1], stop.texts)
        # A row that has ended stays until enough have; what it goes on to say is not counted.
        fresh = rows[ended & ~stopped[rows]]
        stopped[fresh], lengths[fresh] = True, step + 1
        live = ~stopped[rows]
        left = int(live.sum())
        if not left or step + 1 == stop.max_new_tokens:
            break
        if left <= (1 - _DROP_AT) * len(rows):
            keep = live.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            mask, drawn, rows = mask[keep], drawn[keep], rows[keep]
            lanes = [lanes[index] for index in keep.tolist()]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        logits = _next_logits(stack, drawn[:, None], mask, positions(mask)[:, -1:], cache, lanes)

    columns = zip(*(column.cpu().numpy() for column in (tokens, logprobs, lengths, stopped)), strict=True)
    return [Response(ids[:length].copy(), logp[:length].copy(), not end) for ids, logp, length, end in columns]


def _next_logits(
    stack: Stack, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Any, lanes: Sequence[int]
) -> Tensor:
    """Logits of the token after the last, (n, vocabulary); the cache grows by `ids`. `lanes` is in order."""
    with stack.rows.are([lanes.count(lane) for lane in range(len(stack.lanes))]):
        logits: Tensor = stack.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
    return logits[:, -1]


def _has_text(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, texts: tuple[str, ...]) -> Tensor:
    """Which rows end in one of the texts, (n,)."""
    # A text of k characters has at most k tokens beyond the one it ends in.
    longest = max(map(len, texts)) + 1
    tails: Any = tokenizer.batch_decode(tokens[:, -longest:].tolist())
    return torch.tensor([any(text in tail for text in texts) for tail in tails], device=tokens.device)
