"""Sampling with a KV cache, batched over problems and groups.

Short responses to a prompt share a row of the cache with it, as they share a row in the objective. The place of a
response in its row is its seat.

Every response has its own random numbers, which depend on its key alone, so it is the same in any batch (except by
rounding, if a draw falls on the border of two tokens). Token ids and log-probabilities are recorded when a token is
drawn; responses are never tokenized again from text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lorabench.models.passes import cache_argument, computing_only, without_peft
from lorabench.training.distributed import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Limit of the tokens of all responses that share a row of the cache.
_SHARED_TOKENS = 128
# Owner of a cache column that holds a token of the prompt, or padding; a response's token has the seat, from 1.
_PROMPT, _PADDING = 0, -1
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A request for one response; without a key, from which its random numbers come, it is greedy."""

    prompt: tuple[int, ...]
    key: tuple[int, ...] | None


@dataclass(frozen=True)
class Response:
    """The tokens of a response, the stop token included, and their log-probabilities in nats, both (length,)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    truncated: bool


@dataclass(frozen=True)
class Stop:
    """The conditions that end a response: a token, a text, or the number of tokens."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    texts: tuple[str, ...] = ()


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    stop: Stop,
    max_cache_tokens: int,
    autocast: torch.dtype | None = None,
) -> list[Response]:
    """Draw a response to each request, in their order, at temperature 1 from the whole vocabulary.

    `max_cache_tokens` limits the rows times the length of prompt and response in a batch; a single row always fits.
    """
    responses: dict[int, Response] = {}
    device, was_training = next(model.parameters()).device, model.training
    # Requests are sampled together with others of similar prompt length, equal prompts side by side.
    ordered = sorted(range(len(requests)), key=lambda index: (len(requests[index].prompt), requests[index].prompt))
    chunks = packed(ordered, lambda index: len(requests[index].prompt) + stop.max_new_tokens, max_cache_tokens)
    # In training mode a model with activation checkpointing keeps no cache.
    model.eval()
    try:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            for chunk in chunks:
                chosen = [requests[index] for index in chunk]
                drawn = _sample_chunk(model, tokenizer, chosen, stop, device)
                responses.update(zip(chunk, drawn, strict=True))
    finally:
        model.train(was_training)
    return [responses[index] for index in range(len(requests))]


def packed(items: Iterable[T], length: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Split items, ascending in length, so that a part's number times its longest is within a limit, or it has one."""
    part: list[T] = []
    for item in items:
        if part and (len(part) + 1) * length(item) > limit:
            yield part
            part = []
        part.append(item)
    if part:
        yield part


def draw(logprobs: Tensor, uniform: Tensor, contexts: Tensor) -> Tensor:
    """Draw tokens by inversion of the cumulative distribution, (n,).

    Each is drawn from a row of `logprobs` (contexts, vocabulary), which `contexts` (n,) names, by a random number of
    `uniform` (n,), in [0, 1) and in double precision; a negative number selects the most likely token.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    # The total is 1 up to rounding; scaling by it ensures that no token of probability zero is drawn.
    scaled = (uniform * cumulative[contexts, -1])[:, None]
    drawn = torch.searchsorted(cumulative[contexts], scaled, right=True).squeeze(-1)
    drawn = drawn.clamp(max=logprobs.shape[-1] - 1)
    return torch.where(uniform < 0, logprobs.argmax(-1)[contexts], drawn)


def _sample_chunk(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Request],
    stop: Stop,
    device: torch.device,
) -> list[Response]:
    n, longest = len(requests), stop.max_new_tokens
    drawn_from = [
        np.full(longest, -1.0) if r.key is None else np.random.default_rng(r.key).random(longest) for r in requests
    ]
    uniform = torch.as_tensor(np.stack(drawn_from), device=device)
    stops = torch.tensor(stop.tokens, dtype=torch.long, device=device)
    tokens = torch.zeros((n, longest), dtype=torch.long, device=device)
    logprobs = torch.zeros((n, longest), device=device)
    lengths, stopped = np.full(n, longest), np.zeros(n, np.bool_)

    # A prompt goes through the model once for all its responses.
    unique = {prompt: index for index, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
    prompts = np.array([unique[request.prompt] for request in requests])
    width = max(map(len, unique))
    padded, attended = (np.zeros((len(unique), width), np.int64) for _ in range(2))
    for prompt, number in unique.items():
        # Padding is on the left, and has position 0.
        padded[number, width - len(prompt) :], attended[number, width - len(prompt) :] = prompt, 1
    ids, mask = torch.as_tensor(padded, device=device), torch.as_tensor(attended, device=device)
    cache = Cache(layer_class_to_replicate=_CastLayer)
    logits = _logits_at_end(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache, 1)[:, -1]
    # The row of the logits from which each response continues; responses to one prompt start from the same row.
    contexts = torch.as_tensor(prompts, device=device)
    rows = _Rows(prompts, max(1, _SHARED_TOKENS // longest))
    if len(rows.prompts) > len(unique):
        cache.batch_select_indices(torch.as_tensor(rows.prompts, device=device))
    mask = mask[torch.as_tensor(rows.prompts, device=device)]
    # The owner of each column of the cache: padding, the prompt, or a response by its seat in the row.
    owners = torch.where(mask > 0, _PROMPT, _PADDING)
    starts = mask.sum(-1)

    live = np.arange(n)
    for step in range(longest):
        chosen = torch.as_tensor(live, device=device)
        distribution = torch.log_softmax(logits.float(), -1)
        drawn = draw(distribution, uniform[chosen, step], contexts)
        tokens[chosen, step] = drawn
        logprobs[chosen, step] = distribution[contexts, drawn]
        done = torch.isin(drawn, stops).cpu().numpy()
        if stop.texts:
            done |= ended_by_text(tokenizer, stop.texts, tokens[chosen, : step + 1])
        stopped[live[done]], lengths[live[done]] = True, step + 1
        live, drawn = live[~done], drawn[torch.as_tensor((~done).nonzero()[0], device=device)]
        if not len(live) or step + 1 == longest:
            break
        kept = rows.keep(live)
        if kept is not None:
            index = torch.as_tensor(kept, device=device)
            cache.batch_select_indices(index)
            owners, starts = owners[index], starts[index]
        places = rows.places(live)
        width = int(places[1].max()) + 1
        row, column = (torch.as_tensor(where, device=device) for where in places)
        ids = torch.zeros((len(owners), width), dtype=torch.long, device=device)
        new_owners, position_ids = torch.full_like(ids, _PADDING), torch.zeros_like(ids)
        ids[row, column] = drawn
        new_owners[row, column] = torch.as_tensor(rows.seats[live], device=device)
        position_ids[row, column] = starts[row] + step
        owners = torch.cat([owners, new_owners], -1)
        visible = owners != _PADDING
        if rows.shared:
            # Each new token attends to the prompt and to its own response.
            own = owners[:, None] == new_owners[:, :, None]
            visible = (own | (owners == _PROMPT)[:, None])[:, None]
        logits = _logits_at_end(model, ids, visible, position_ids, cache, width)[row, column]
        contexts = torch.arange(len(live), device=device)

    results = zip(*(result.cpu().numpy() for result in (tokens, logprobs)), lengths, stopped, strict=True)
    return [Response(ids[:length].copy(), logp[:length].copy(), not end) for ids, logp, length, end in results]


class _Rows:
    """The rows of the cache, each with a prompt and the responses to it that have a seat in the row.

    Short responses share a row, so that their prompt is in the cache once. Each longer response has its own row, since
    attention is computed over the whole row. Given are the index of the prompt of each response, equal ones adjacent,
    and the largest number of responses in a row. `prompts` has the index of each row's prompt, `seats` the seat of each
    response in its row, from 1.
    """

    def __init__(self, prompts: np.ndarray, seats: int) -> None:
        _, first, place = np.unique(prompts, return_index=True, return_inverse=True)
        nth = np.arange(len(prompts)) - first[place]
        starts = nth % seats == 0
        self.prompts, self.seats = prompts[starts], nth % seats + 1
        self._rows = starts.cumsum() - 1
        self.shared = bool((self.seats > 1).any())

    def keep(self, live: np.ndarray) -> np.ndarray | None:
        """Drop the rows whose responses have all ended and return the indices of the others; None: it wouldn't pay."""
        kept = np.unique(self._rows[live])
        # Dropping copies the remaining rows, so it is done for a quarter of all rows at least.
        if len(kept) > 0.75 * len(self.prompts):
            return None
        self._rows = np.searchsorted(kept, self._rows)
        self.prompts = self.prompts[kept]
        return kept

    def places(self, live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row and the column of the next token of each live response."""
        row = self._rows[live]
        _, first, place = np.unique(row, return_index=True, return_inverse=True)
        return row, np.arange(len(row)) - first[place]


def _logits_at_end(
    model: torch.nn.Module, ids: Tensor, mask: Tensor, position_ids: Tensor, cache: Cache, last: int
) -> Tensor:
    """Return the logits at the last `last` of the new tokens `ids`, (rows, last, vocabulary).

    The attention mask is (rows, all tokens) or (rows, 1, tokens, all tokens). The cache grows by all new tokens.
    """
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)[:, -last:].flatten()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    inputs |= {cache_argument(without_peft(model)): cache}
    with computing_only(model, places):
        logits: Tensor = model(**inputs, use_cache=True, logits_to_keep=last).logits
    return logits


class _CastLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the KV cache, which with autocast holds the type of the products."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (batch, heads, tokens, width); return those of all tokens."""
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        whole: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return whole


def ended_by_text(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], tokens: Tensor) -> np.ndarray:
    """Return whether a stop text is near the end of each response, given its tokens so far, (n, tokens): (n,)."""
    # A text of k characters, whose last one the last token brings, spans at most k tokens before it.
    span = max(map(len, texts)) + 1
    decoded: list[str] = tokenizer.batch_decode(tokens[:, -span:].tolist())
    return np.array([any(text in tail for text in texts) for tail in decoded])


def sample_in_processes(
    requests: list[Request], draw: Callable[[list[Request]], list[Response]], processes: Processes
) -> list[Response]:
    """Draw this process's share of the responses and gather all; every process returns the same, in request order."""
    if processes.count == 1:
        return draw(requests)
    # Shares are of prompts, since a prompt goes through the model once for all its responses.
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    own = {prompts[index] for index in processes.share(np.array([len(prompt) for prompt in prompts]))}
    indices = [index for index, request in enumerate(requests) if request.prompt in own]
    drawn = zip(indices, draw([requests[index] for index in indices]), strict=True)
    gathered = dict(pair for part in processes.gather_objects(list(drawn)) for pair in part)
    return [gathered[index] for index in range(len(requests))]
