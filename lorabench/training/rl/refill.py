"""Sampling of long responses with as many rows as the cache holds: where responses end, others begin.

`sampler.py` draws a batch of responses until its longest has ended, so that most rows are idle for most of the time
where lengths differ much. Here the rows of ended responses are given to waiting requests. Each response has its own
random numbers and positions, so it is the same as from `sampler.py`, except that log-probabilities differ by rounding.

All rows share the columns of the cache. A new row has its prompt in the last columns, and padding before it. Columns
that only ended responses have used are removed whenever rows are exchanged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lorabench.models.lanes.shelf import Stack
from lorabench.training.rl.cache import growing_cache, join
from lorabench.training.rl.sampler import (
    Request,
    Response,
    Stop,
    TextStops,
    draw,
    drawing,
    lanes_of,
    left_padded,
    logits_at_end,
    on_device,
    positions,
    uniforms,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows are exchanged once this share of them has ended, since that copies the cache.
_EXCHANGE_AT = 0.125
# Columns of the cache beside those of the longest prompt and response, as a share of these: room for what ended
# responses have used.
_SLACK = 0.125


@torch.no_grad()
def sample_refilling(
    stack: Stack,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    stop: Stop,
    max_cache_tokens: int,
    autocast: torch.dtype | None = None,
    interrupt: Callable[[], None] = lambda: None,
) -> list[Response]:
    """Draw a response to each request; the arguments and the responses are those of `sampler.sample`."""
    with drawing(stack, autocast) as device:
        drawn = _Responses(stack, tokenizer, requests, stop, max_cache_tokens, device)
        while drawn.exchange_where_due():
            interrupt()
            drawn.draw_next()
    return drawn.finished()


class _Responses:
    """The responses that are drawn, each in a row of the cache, and the requests that wait for a row.

    Attributes:
        waiting: the requests that wait, by index.
        rows: the request of each row, in the order of their lanes.
        alive: whether the response of each row has not ended, (rows,).
        pending: the last token of each row, which has not gone through the model, (rows,).
        is_token: whether a column of the cache holds a token of the row, (rows, columns).
        limit: the largest number of columns.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        stop: Stop,
        max_cache_tokens: int,
        device: torch.device,
    ) -> None:
        self._stack, self._requests, self._stop, self._device = stack, requests, stop, device
        self._max_cache_tokens, self._text_stops = max_cache_tokens, TextStops(tokenizer, stop.texts)
        self._stop_tokens = torch.tensor(stop.tokens, dtype=torch.long, device=device)
        self._lanes = np.array(lanes_of(stack, requests), np.int64)
        # Long prompts come first, so that later ones find room; equal ones are neighbours and are computed once.
        order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt), requests[index].prompt))
        self.waiting = deque(order)
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._logprobs: list[list[float]] = [[] for _ in requests]
        self._numbers: dict[int, np.ndarray] = {}
        self._stopped = np.zeros(len(requests), np.bool_)
        self._cache = growing_cache()
        self.rows, self.pending, self.alive = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.bool_)
        self.is_token, self.limit = torch.zeros((0, 0), dtype=torch.bool, device=device), 0

    def finished(self) -> list[Response]:
        """Return the responses, in the order of the requests."""
        return [
            Response(np.array(tokens, np.int64), np.array(logprobs, np.float32), not stopped)
            for tokens, logprobs, stopped in zip(self._tokens, self._logprobs, self._stopped.tolist(), strict=True)
        ]

    def exchange_where_due(self) -> bool:
        """Give the rows of ended responses to waiting requests, where that pays; return whether any row is alive."""
        while True:
            ended = len(self.rows) - int(self.alive.sum())
            if (
                ended < len(self.rows)
                and ended <= _EXCHANGE_AT * len(self.rows)
                and self.is_token.shape[1] < self.limit
            ):
                return True
            if ended == len(self.rows) and not self.waiting:
                return False
            self._exchange()

    def draw_next(self) -> None:
        """Draw the next token of each response that has not ended."""
        alive = self.alive.nonzero()[0]
        mask = on_device(self.alive, self._device)
        self.is_token = torch.cat([self.is_token, mask[:, None]], -1)
        ids = np.where(self.alive, self.pending, 0)
        # The pending token is the last of the response.
        places = [len(self._requests[index].prompt) + len(self._tokens[index]) - 1 for index in self.rows.tolist()]
        logits = logits_at_end(
            self._stack,
            on_device(ids, self._device)[:, None],
            self.is_token,
            on_device(np.where(self.alive, places, 0), self._device)[:, None],
            self._cache,
            self._lanes[self.rows].tolist(),
            1,
        )[:, -1]
        self._draw(alive, logits, on_device(alive, self._device))

    def _draw(self, rows: np.ndarray, logits: Tensor, contexts: Tensor) -> None:
        """Draw a token for some rows, each from one of the logits, and note which responses end with it."""
        requests = self.rows[rows].tolist()
        numbers = [self._numbers[index][len(self._tokens[index])] for index in requests]
        distribution = torch.log_softmax(logits.float(), -1)
        drawn = draw(distribution, torch.tensor(numbers, dtype=torch.float64, device=self._device), contexts)
        logprobs = distribution[contexts, drawn].tolist()
        done = torch.isin(drawn, self._stop_tokens).cpu().numpy()
        tokens = drawn.cpu().numpy()
        for index, token, logprob in zip(requests, tokens.tolist(), logprobs, strict=True):
            self._tokens[index].append(token)
            self._logprobs[index].append(logprob)
        if self._stop.texts:
            longest = self._text_stops.longest
            done |= self._text_stops.ended([self._tokens[index][-longest:] for index in requests])
        self._stopped[requests] = done
        full = np.array([len(self._tokens[index]) == self._stop.max_new_tokens for index in requests])
        self.pending[rows], self.alive[rows] = tokens, ~(done | full)
        for index in self.rows[rows[done | full]].tolist():
            del self._numbers[index]

    def _exchange(self) -> None:
        """Drop the rows of ended responses, and begin responses to waiting requests."""
        kept = self.alive.nonzero()[0]
        begun = self._admitted(self.rows[kept])
        rows = np.concatenate([self.rows[kept], begun])
        # The rows of a lane lie side by side.
        order = np.argsort(self._lanes[rows], kind="stable")
        is_token = self.is_token[on_device(kept, self._device)]
        if len(kept):
            is_token = is_token[:, int(is_token.any(0).int().argmax()) :]
        logits: Tensor | None = None
        others, contexts = self._cache, np.zeros(0, np.int64)
        width = is_token.shape[1] if len(kept) else 0
        if len(begun):
            others, logits, contexts, prompt_tokens = self._prefilled(begun)
            width = max(width, prompt_tokens.shape[1])
            is_token = torch.cat([_at_the_end(part, width) for part in (is_token[: len(kept)], prompt_tokens)])
        where = [on_device(index, self._device) for index in (kept, contexts, order)]
        if len(kept):
            join(self._cache, where[0], others, where[1], where[2], width)
        else:
            self._cache = others
            self._cache.batch_select_indices(on_device(contexts[order], self._device))
        self.rows, self.is_token = rows[order], is_token[where[2]]
        self.pending = np.concatenate([self.pending[kept], np.zeros(len(begun), np.int64)])[order]
        self.alive = np.ones(len(rows), np.bool_)
        if logits is not None:
            new = (order >= len(kept)).nonzero()[0]
            self._draw(new, logits, on_device(contexts[order[new] - len(kept)], self._device))

    def _admitted(self, kept: np.ndarray) -> np.ndarray:
        """Take as many waiting requests as find room beside those kept, and set the limit of columns."""
        prompts = [len(self._requests[index].prompt) for index in (*kept.tolist(), *list(self.waiting)[:1])]
        self.limit = math.ceil((1 + _SLACK) * (max(prompts) + self._stop.max_new_tokens))
        room = max(1, self._max_cache_tokens // self.limit) - len(kept)
        begun = [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        for index in begun:
            key, longest = self._requests[index].key, self._stop.max_new_tokens
            self._numbers[index] = np.full(longest, -1.0) if key is None else uniforms(key, longest)
        return np.array(begun, np.int64)

    def _prefilled(self, begun: np.ndarray) -> tuple[Cache, Tensor, np.ndarray, Tensor]:
        """Compute the prompts of some requests, each once for all its responses.

        Returns:
            A cache with a row for each prompt, the logits at the end of each, the prompt of each request by index, and
            whether a column of a request's row holds a token, (requests, columns).
        """
        of_lanes = [(int(self._lanes[index]), self._requests[index].prompt) for index in begun.tolist()]
        unique = {prompt: number for number, prompt in enumerate(sorted(set(of_lanes)))}
        ids, mask = left_padded([prompt for _, prompt in unique], self._device)
        cache, lanes = growing_cache(), [lane for lane, _ in unique]
        logits = logits_at_end(self._stack, ids, mask, positions(mask), cache, lanes, 1)[:, -1]
        prompts = np.array([unique[prompt] for prompt in of_lanes], np.int64)
        return cache, logits, prompts, mask[on_device(prompts, self._device)] > 0


def _at_the_end(is_token: Tensor, width: int) -> Tensor:
    """Return columns as the last of `width`, after padding."""
    return torch.nn.functional.pad(is_token, (width - is_token.shape[1], 0))
