"""Sampling with a KV cache, batched over problems, groups and lanes.

Short responses to a prompt share its row of the cache, as they do where they are learned from.

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
from lorabench.models.last_layer import read_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Finished rows are dropped from the cache once they are this share of it: dropping copies the rest.
_DROP_AT = 0.25
# Responses share a row of the cache as long as they have so many tokens in all.
_SHARED_TOKENS = 128
_PROMPTS, _NOBODYS = 0, -1


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


def draw(logprobs: Tensor, uniform: Tensor, contexts: Tensor) -> Tensor:
    """Tokens by inversion of the distribution function, (n,).

    Args:
        logprobs: (contexts, vocabulary).
        uniform: (n,) in [0, 1), double precision; negative takes the most likely token.
        contexts: (n,), the row of `logprobs` that each is drawn from.
    """
    cumulated = logprobs.double().exp().cumsum(-1)
    # The sum is 1 but for rounding; scaled to it, no token of probability zero is ever drawn.
    wanted = uniform * cumulated[contexts, -1]
    drawn = torch.searchsorted(cumulated[contexts], wanted[:, None], right=True).squeeze(-1)
    drawn = drawn.clamp(max=logprobs.shape[-1] - 1)
    return torch.where(uniform < 0, logprobs.argmax(-1)[contexts], drawn)


def window(model: torch.nn.Module) -> int | None:
    """How far back a model's layers of sliding attention see, in tokens; None if it has none.

    The mask of a row that responses share does not know of it.
    """
    config: Any = model.config
    found = getattr(config, "sliding_window", None)
    return int(found) if found and getattr(config, "use_sliding_window", True) else None


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

    n, longest = len(requests), stop.max_new_tokens
    chance = np.full((n, longest), -1.0)
    for number, request in enumerate(requests):
        if request.key is not None:
            chance[number] = uniforms(request.key, longest)
    uniform = torch.from_numpy(chance).to(device)
    stops = torch.tensor(stop.tokens, dtype=torch.long, device=device)
    tokens = torch.zeros((n, longest), dtype=torch.long, device=device)
    logprobs = torch.zeros((n, longest), device=device)
    lengths, stopped = np.full(n, longest), np.zeros(n, np.bool_)

    # A prompt goes through the model once, however many responses it gets.
    asked = [(lane, request.prompt) for lane, request in zip(lanes, requests, strict=True)]
    unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(asked))}
    prompts = np.array([unique[one] for one in asked])
    ids, mask = left_padded([prompt for _, prompt in unique], device)
    cache = growing_cache()
    of_prompts = [lane for lane, _ in unique]
    logits = _logits(stack, ids, mask, positions(mask), cache, of_prompts, 1)[:, -1]
    # The row of the logits that a response goes on from; responses to one prompt all begin in the same.
    contexts = _on(prompts, device)
    within, farthest = window(stack.model), ids.shape[1] + longest
    seats = max(1, _SHARED_TOKENS // longest) if within is None or farthest <= within else 1
    rows = _Rows(prompts, seats)
    if len(rows.prompts) > len(unique):
        cache.batch_select_indices(_on(rows.prompts, device))
    mask = mask[_on(rows.prompts, device)]
    # Whose a column of the cache is: padding's, the prompt's, or that of a response by its seat in the row.
    owners = torch.where(mask > 0, _PROMPTS, _NOBODYS)
    starts = mask.sum(-1)

    live = np.arange(n)
    for step in range(longest):
        chosen = _on(live, device)
        distribution = torch.log_softmax(logits.float(), -1)
        drawn = draw(distribution, uniform[chosen, step], contexts)
        tokens[chosen, step] = drawn
        logprobs[chosen, step] = distribution[contexts, drawn]
        ended = torch.isin(drawn, stops)
        if stop.texts:
            ended |= _has_text(tokenizer, tokens[chosen, : step + 1], stop.texts)
        over = ended.cpu().numpy()
        stopped[live[over]], lengths[live[over]] = True, step + 1
        live, drawn = live[~over], drawn[_on((~over).nonzero()[0], device)]
        if not len(live) or step + 1 == longest:
            break
        kept = rows.keep(live)
        if kept is not None:
            index = _on(kept, device)
            cache.batch_select_indices(index)
            owners, starts = owners[index], starts[index]
        places = rows.places(live)
        width = int(places[1].max()) + 1
        row, column = (_on(where, device) for where in places)
        ids = torch.zeros((len(owners), width), dtype=torch.long, device=device)
        takers, position_ids = torch.full_like(ids, _NOBODYS), torch.zeros_like(ids)
        ids[row, column] = drawn
        takers[row, column] = _on(rows.seats[live], device)
        position_ids[row, column] = starts[row] + step
        owners = torch.cat([owners, takers], -1)
        of_rows = [of_prompts[prompt] for prompt in rows.prompts]
        seen = _seen(owners, takers, rows.shared)
        logits = _logits(stack, ids, seen, position_ids, cache, of_rows, width)[row, column]
        contexts = torch.arange(len(live), device=device)

    columns = zip(*(column.cpu().numpy() for column in (tokens, logprobs)), lengths, stopped, strict=True)
    return [Response(ids[:length].copy(), logp[:length].copy(), not end) for ids, logp, length, end in columns]


class _Rows:
    """Rows of the cache, each of a prompt and of responses to it that have a seat there.

    Short responses share a row with their prompt, which so lies in the cache once; of longer ones each has a row, since
    attention reaches over all of it.

    Attributes:
        prompts: the prompt of each row.
        seats: of each response, from 1 on.
        shared: whether a row has several seats.
    """

    def __init__(self, prompts: np.ndarray, most: int) -> None:
        """
        Args:
            prompts: the prompt of each response, by its number; equal ones lie side by side.
            most: responses of a row.
        """
        _, first, place = np.unique(prompts, return_index=True, return_inverse=True)
        nth = np.arange(len(prompts)) - first[place]
        starts = nth % most == 0
        self.prompts, self.seats = prompts[starts], nth % most + 1
        self._rows = starts.cumsum() - 1
        self.shared = bool((self.seats > 1).any())

    def keep(self, live: np.ndarray) -> np.ndarray | None:
        """Give up rows whose responses have all ended; those that stay, or None where it is not worth it yet."""
        kept = np.unique(self._rows[live])
        if len(kept) > (1 - _DROP_AT) * len(self.prompts):
            return None
        self._rows = np.searchsorted(kept, self._rows)
        self.prompts = self.prompts[kept]
        return kept

    def places(self, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the next token of each response."""
        row = self._rows[live]
        _, first, place = np.unique(row, return_index=True, return_inverse=True)
        return row, np.arange(len(row)) - first[place]


def _seen(owners: Tensor, takers: Tensor, shared: bool) -> Tensor:
    """The attention mask of new tokens: each sees the prompt and the response that it is of."""
    if not shared:
        return owners != _NOBODYS
    of_prompt = (owners == _PROMPTS)[:, None]
    return ((owners[:, None] == takers[:, :, None]) | of_prompt)[:, None]


def _on(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers).to(device)


def _logits(
    stack: Stack, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Any, lanes: Sequence[int], last: int
) -> Tensor:
    """Logits of what follows the last so many tokens, (rows, last, vocabulary); the cache grows by `ids`.

    Args:
        mask: (rows, all tokens), or (rows, 1, tokens of ids, all tokens).
        lanes: of each row, in order.
    """
    counts = [lanes.count(lane) for lane in range(len(stack.lanes))]
    rows, length = ids.shape
    read = torch.arange(rows * length, device=ids.device).view(rows, length)[:, -last:].flatten()
    with stack.rows.are(counts), read_at(stack.model, read, stack.rows, [count * last for count in counts]):
        logits: Tensor = stack.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits
    return logits


def _has_text(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, texts: tuple[str, ...]) -> Tensor:
    """Which rows end in one of the texts, (n,)."""
    # A text of k characters has at most k tokens beyond the one it ends in.
    longest = max(map(len, texts)) + 1
    tails: Any = tokenizer.batch_decode(tokens[:, -longest:].tolist())
    return torch.tensor([any(text in tail for text in texts) for tail in tails], device=tokens.device)
