"""The loss of SFT: the NLL in nats, summed over scored tokens, of one model or of several lanes.

Logits are computed only at scored tokens, and for a limited number of tokens at a time, so that the logits of a whole
batch with a large vocabulary are never held at once. The decoder and the unembedding are called as modules, so that
LoRA on either takes effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorabench.data.tokens import TokenizedSplit
from lorabench.errors import UserError
from lorabench.models.lanes.shelf import RowCounts
from lorabench.models.last_layer import computing_only, without_peft
from lorabench.training.batches import (
    IGNORED,
    PASS_TOKENS,
    Batch,
    collate,
    concatenated,
    micro_batches,
    scored_by_example,
    scored_tokens,
)
from lorabench.training.distributed import SINGLE_PROCESS, Processes, call_as_forward

if TYPE_CHECKING:
    from torch import nn

MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Largest number of logits computed at once, by device type: 64 and 256 MiB in fp32, a few times that with gradients.

Smaller pieces make the products of the unembedding slow, since its weights are read for each piece. The CPU's value was
measured against a quarter of it (`python -m benchmarks.parts`); the GPU's is assumed.
"""


def nll_sum(model: nn.Module, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the sum of the NLL over scored targets, a scalar in fp32; the arguments are the fields of a `Batch`.

    With a gradient all logits are computed at once.
    """
    return nll_sums(model, Batch(inputs, targets, positions), RowCounts(1)).sum()


def nll_sums(model: nn.Module, batch: Batch, rows: RowCounts) -> Tensor:
    """Return the sum of the NLL over each lane's scored targets, (lanes,), in fp32.

    With a gradient, all logits are computed at once and the last layer at all tokens; `add_gradient` avoids both.

    Args:
        batch: has equally many rows of each lane, lane after lane.
    """
    scored = _Scored.of(batch, rows)
    with _through(model, batch, rows, None if torch.is_grad_enabled() else scored):
        return call_as_forward(model, _nll_sums, batch, rows, scored)


def _nll_sums(model: nn.Module, batch: Batch, rows: RowCounts, scored: _Scored) -> Tensor:
    hidden, targets = _hidden(model, batch, scored), scored.targets
    size = max(1, len(targets)) if torch.is_grad_enabled() else _tokens_at_once(model, MAX_LOGITS[targets.device.type])
    pieces = _pieces(scored.counts, size)
    return torch.stack([_sums(model, hidden[piece], targets[piece], counts, rows) for piece, counts in pieces]).sum(0)


def _nlls(model: nn.Module, batch: Batch, rows: RowCounts, scored: _Scored) -> Tensor:
    """Return the NLL of each scored target, (scored,), in fp32."""
    hidden, size = _hidden(model, batch, scored), _tokens_at_once(model, MAX_LOGITS[scored.targets.device.type])
    pieces = _pieces(scored.counts, size)
    return torch.cat(
        [_token_nlls(model, hidden[piece], scored.targets[piece], counts, rows) for piece, counts in pieces]
    )


def add_gradient(
    model: nn.Module,
    batch: Batch,
    rows: RowCounts,
    divisors: Sequence[int],
    autocast: torch.dtype | None,
    max_logits: int | None,
) -> Tensor:
    """Add the gradient of each lane's NLL divided by its divisor, and return these quotients, (lanes,), on the device.

    Args:
        batch: has equally many rows of each lane, lane after lane.
        divisors: a number for each lane, usually the scored tokens of its whole batch.
        autocast: the type of autocast; None for fp32.
        max_logits: limit of the logits computed at once (see `MAX_LOGITS`); None for no limit, as a sharded model
            needs.
    """
    device = batch.inputs.device
    divisor = torch.tensor(divisors, dtype=torch.float32, device=device)

    def cast() -> torch.autocast:
        return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)

    scored = _Scored.of(batch, rows)
    # The context includes the backward pass, since recomputed layers read the rows and tokens again.
    with _through(model, batch, rows, scored):
        if max_logits is None or len(scored.tokens) <= _tokens_at_once(model, max_logits):
            with cast():
                nll = call_as_forward(model, _nll_sums, batch, rows, scored) / divisor
            nll.sum().backward()
            return nll.detach()
        with cast():
            hidden = _hidden(model, batch, scored)
        # The backward pass goes through the unembedding piece by piece, then once through the decoder.
        leaf, total = hidden.detach().requires_grad_(), torch.zeros_like(divisor)
        for piece, counts in _pieces(scored.counts, _tokens_at_once(model, max_logits)):
            with cast():
                nll = _sums(model, leaf[piece], scored.targets[piece], counts, rows) / divisor
            nll.sum().backward()
            total += nll.detach()
        hidden.backward(leaf.grad)
    return total


class _Scored(NamedTuple):
    """The scored tokens of a batch: indices into (rows x length), the targets there, and the count of each lane."""

    tokens: Tensor
    targets: Tensor
    counts: list[int]

    @classmethod
    def of(cls, batch: Batch, rows: RowCounts) -> _Scored:
        targets = batch.targets.flatten()
        tokens = (targets != IGNORED).nonzero().squeeze(1)
        return cls(tokens, targets[tokens], batch.scored_by(len(rows.counts)).tolist())


@contextmanager
def _through(model: nn.Module, batch: Batch, rows: RowCounts, scored: _Scored | None) -> Iterator[None]:
    """Within the context, layers know each row's lane and the tokens that are read; `scored` is None for all tokens."""
    lanes = len(rows.counts)
    read = computing_only(model, scored.tokens, rows, scored.counts) if scored else nullcontext()
    with rows.are((len(batch.inputs) // lanes,) * lanes), read:
        yield


def _tokens_at_once(model: nn.Module, max_logits: int) -> int:
    """Return the number of tokens that have at most `max_logits` logits, at least 1."""
    return max(1, max_logits // int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]


def _hidden(model: nn.Module, batch: Batch, scored: _Scored) -> Tensor:
    """Return the inputs of the unembedding at scored tokens, (scored, width)."""
    decoder = without_peft(model).get_decoder()
    hidden: Tensor = decoder(
        input_ids=batch.inputs, position_ids=batch.positions, use_cache=False
    ).last_hidden_state.flatten(0, 1)
    return hidden[scored.tokens]


def _token_nlls(model: nn.Module, hidden: Tensor, targets: Tensor, counts: Sequence[int], rows: RowCounts) -> Tensor:
    with rows.are(counts):
        logits = without_peft(model).get_output_embeddings()(hidden)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _sums(model: nn.Module, hidden: Tensor, targets: Tensor, counts: Sequence[int], rows: RowCounts) -> Tensor:
    nll = _token_nlls(model, hidden, targets, counts, rows)
    return torch.stack([part.sum() for part in nll.split(list(counts))])


def _pieces(counts: Sequence[int], size: int) -> Iterator[tuple[slice, list[int]]]:
    """Yield slices of at most `size` scored tokens, and the number of tokens of each lane in each slice."""
    total = sum(counts)
    ends = [sum(counts[: lane + 1]) for lane in range(len(counts))]
    for start in range(0, max(total, 1), size):
        stop = min(start + size, total)
        inside = [max(0, min(stop, end) - max(start, end - count)) for end, count in zip(ends, counts, strict=True)]
        yield slice(start, stop), inside


def check_plain_head(model: nn.Module) -> None:
    """Refuse models that change logits after the unembedding, which `nll_sum` would not do.

    Raises:
        UserError: the model scales or caps its logits.
    """
    config = model.config
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits ({name}); such models are not supported yet")


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse models in which an example attends to the examples packed before it.

    Raises:
        UserError: the hidden states of the second of two packed examples depend on the first.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    first = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device)
    second = torch.tensor([9, 10, 11, 12], device=device)
    behind_one, behind_other = (
        model.get_decoder()(  # type: ignore[operator]
            input_ids=torch.cat([ids, second])[None], position_ids=positions, use_cache=False
        ).last_hidden_state[0, 4:]
        for ids in first
    )
    if not torch.allclose(behind_one, behind_other, rtol=1e-3, atol=1e-3 * float(behind_one.abs().max())):
        raise UserError(f"{type(model).__name__} lets packed examples see each other; set execution.packing to false")


@torch.no_grad()
def mean_nll(
    model: nn.Module,
    split: TokenizedSplit,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: Processes = SINGLE_PROCESS,
    packing: bool = False,
) -> float:
    """Return the token-weighted NLL of a whole split in nats per scored token; see `example_nlls`."""
    nats = example_nlls(model, RowCounts(1), split, max_tokens, device, autocast, processes, packing)
    return float(nats.sum()) / scored_tokens(split)


@torch.no_grad()
def example_nlls(
    model: nn.Module,
    rows: RowCounts,
    split: TokenizedSplit,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: Processes = SINGLE_PROCESS,
    packing: bool = False,
) -> np.ndarray:
    """Return the NLL of each example of a split, summed over its scored tokens, in nats: (lanes, examples).

    Args:
        max_tokens: limit of the tokens, padding included, that go through the model at once, over all lanes.
        autocast: the type of autocast; None for fp32.
        processes: the processes that share the split; all return the same numbers.
        packing: whether examples are packed.
    """
    lanes, counts = len(rows.counts), scored_by_example(split)
    tokens: list[Tensor] = []
    owners: list[np.ndarray] = []
    share = processes.share(split.lengths())
    # All lanes measure the same examples, so the limit and the fixed cost of a pass are divided among them.
    lane_max_tokens, lane_pass_tokens = max_tokens // lanes, PASS_TOKENS[device.type] // lanes
    parts = [part for (part,) in micro_batches([split.lengths()[share]], lane_max_tokens, lane_pass_tokens, packing)]
    for part in processes.even(parts, share[:0]):
        examples = [share[row] for row in part]
        batch = concatenated([collate(split, examples)] * lanes).to(device)
        scored = _Scored.of(batch, rows)
        with (
            torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
            _through(model, batch, rows, scored),
        ):
            tokens.append(call_as_forward(model, _nlls, batch, rows, scored).view(lanes, -1))
        flat = np.concatenate([np.atleast_1d(row) for row in (*examples, share[:0])])
        owners.append(np.repeat(flat, counts[flat]))
    nats, owner = torch.cat(tokens, dim=1).double().cpu().numpy(), np.concatenate(owners)
    sums = np.array([np.bincount(owner, weights=of_lane, minlength=len(split)) for of_lane in nats])
    # Each process has measured its share, and has 0 for the examples of the others.
    whole: np.ndarray = processes.gather(sums.ravel()).sum(0).reshape(lanes, len(split))
    return whole
