"""The one loss: NLL in nats, summed over scored tokens, for one model or for several lanes of it.

Logits are computed where a token is scored and nowhere else, and of so many tokens at a time that those of a whole
batch with a large vocabulary are never held at once. The decoder and the unembedding are called as modules, so LoRA on
either takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorabench.data.tokens import TokenizedSplit
from lorabench.errors import UserError
from lorabench.models.lanes import Rows
from lorabench.models.last_layer import read_at, unwrapped
from lorabench.training.batches import IGNORED, PASS_TOKENS, Batch, collate, joined, micro_batches
from lorabench.training.distributed import ALONE, Processes, enter

if TYPE_CHECKING:
    from torch import nn

# Logits that are computed at once, of all scored tokens of a pass: 64 and 256 MiB in fp32, a few times as much with
# their gradient. Fewer make the products of the unembedding slow, whose weights are read for each piece. On a CPU
# measured against a quarter of them (`python -m tests.benchmarks.parts`), of a GPU assumed.
MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}


def nll_sum(model: nn.Module, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Tensor:
    """Sum of the NLL over scored targets, a scalar, in fp32; the arguments are those of a `Batch`.

    All logits are computed at once.
    """
    return nll_sums(model, Batch(inputs, targets, positions), Rows(1)).sum()


def nll_sums(model: nn.Module, batch: Batch, rows: Rows) -> Tensor:
    """Sum of the NLL over each lane's scored targets, (lanes,), in fp32.

    With a gradient all logits are computed at once, and all tokens to the end (but see `add_gradient`).

    Args:
        batch: as many rows of each lane, lane after lane.
    """
    scored = _Scored.of(batch, rows)
    with _through(model, batch, rows, None if torch.is_grad_enabled() else scored):
        return enter(model, _nll_sums, batch, rows, scored)


def _nll_sums(model: nn.Module, batch: Batch, rows: Rows, scored: _Scored) -> Tensor:
    hidden, targets = _hidden(model, batch, scored), scored.targets
    size = max(1, len(targets)) if torch.is_grad_enabled() else _at_once(model, MAX_LOGITS[targets.device.type])
    pieces = _pieces(scored.counts, size)
    return torch.stack([_sums(model, hidden[piece], targets[piece], own, rows) for piece, own in pieces]).sum(0)


def add_gradient(
    model: nn.Module,
    batch: Batch,
    rows: Rows,
    divisors: Sequence[int],
    autocast: torch.dtype | None,
    max_logits: int | None,
) -> Tensor:
    """Add the gradient of each lane's NLL over its divisor; returns those quotients, (lanes,), on the device.

    Args:
        batch: as many rows of each lane, lane after lane.
        max_logits: of what is computed at once (see `MAX_LOGITS`); None for all, as a sharded model needs.
    """
    device = batch.inputs.device
    divisor = torch.tensor(divisors, dtype=torch.float32, device=device)

    def cast() -> torch.autocast:
        return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)

    scored = _Scored.of(batch, rows)
    # Around the backward pass too: layers whose activations are computed again ask for all of this again.
    with _through(model, batch, rows, scored):
        if max_logits is None or len(scored.tokens) <= _at_once(model, max_logits):
            with cast():
                nll = enter(model, _nll_sums, batch, rows, scored) / divisor
            nll.sum().backward()
            return nll.detach()
        with cast():
            hidden = _hidden(model, batch, scored)
        # The graph of the unembedding is walked piece by piece, then that of the decoder once.
        leaf, total = hidden.detach().requires_grad_(), torch.zeros_like(divisor)
        for piece, own in _pieces(scored.counts, _at_once(model, max_logits)):
            with cast():
                nll = _sums(model, leaf[piece], scored.targets[piece], own, rows) / divisor
            nll.sum().backward()
            total += nll.detach()
        hidden.backward(leaf.grad)
    return total


class _Scored(NamedTuple):
    """Where a batch is scored: places in (rows x length), the targets there, and how many are each lane's."""

    tokens: Tensor
    targets: Tensor
    counts: list[int]

    @classmethod
    def of(cls, batch: Batch, rows: Rows) -> _Scored:
        targets = batch.targets.flatten()
        tokens = (targets != IGNORED).nonzero().squeeze(1)
        return cls(tokens, targets[tokens], batch.scored_by(len(rows.counts)).tolist())


@contextmanager
def _through(model: nn.Module, batch: Batch, rows: Rows, scored: _Scored | None) -> Iterator[None]:
    """Within, layers know whose the rows of the batch are, and which tokens are read, None for all."""
    lanes = len(rows.counts)
    read = read_at(model, scored.tokens, rows, scored.counts) if scored else nullcontext()
    with rows.are((len(batch.inputs) // lanes,) * lanes), read:
        yield


def _at_once(model: nn.Module, max_logits: int) -> int:
    """Tokens that have so many logits."""
    return max(1, max_logits // int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]


def _hidden(model: nn.Module, batch: Batch, scored: _Scored) -> Tensor:
    """What goes into the unembedding where a token is scored, (scored, width)."""
    decoder = unwrapped(model).get_decoder()
    hidden: Tensor = decoder(
        input_ids=batch.inputs, position_ids=batch.positions, use_cache=False
    ).last_hidden_state.flatten(0, 1)
    return hidden[scored.tokens]


def _sums(model: nn.Module, hidden: Tensor, targets: Tensor, counts: Sequence[int], rows: Rows) -> Tensor:
    with rows.are(counts):
        logits = unwrapped(model).get_output_embeddings()(hidden)
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return torch.stack([part.sum() for part in nll.split(list(counts))])


def _pieces(counts: Sequence[int], size: int) -> Iterator[tuple[slice, list[int]]]:
    """Slices of so many scored tokens, and how many of each lane are in each."""
    total = sum(counts)
    ends = [sum(counts[: lane + 1]) for lane in range(len(counts))]
    for start in range(0, max(total, 1), size):
        stop = min(start + size, total)
        own = [max(0, min(stop, end) - max(start, end - count)) for end, count in zip(ends, counts, strict=True)]
        yield slice(start, stop), own


def check_plain_head(model: nn.Module) -> None:
    """Refuse models that change logits after the unembedding, which `nll_sum` would leave out.

    Raises:
        UserError: the model scales or caps its logits.
    """
    config = model.config
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits ({name}); such models are not supported yet")


@torch.no_grad()
def check_packing(model: nn.Module) -> None:
    """Refuse models in which an example sees those packed before it.

    Raises:
        UserError: the second of two packed examples changes with the first.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    first = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device)
    second = torch.tensor([9, 10, 11, 12], device=device)
    alone, beside = (
        model.get_decoder()(  # type: ignore[operator]
            input_ids=torch.cat([ids, second])[None], position_ids=positions, use_cache=False
        ).last_hidden_state[0, 4:]
        for ids in first
    )
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise UserError(f"{type(model).__name__} lets packed examples see each other; set execution.packing to false")


@torch.no_grad()
def mean_nll(
    model: nn.Module,
    split: TokenizedSplit,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: Processes = ALONE,
    packing: bool = False,
) -> float:
    """NLL in nats per scored token of a whole split, token-weighted."""
    return mean_nlls(model, Rows(1), split, max_tokens, device, autocast, processes, packing)[0]


@torch.no_grad()
def mean_nlls(
    model: nn.Module,
    rows: Rows,
    split: TokenizedSplit,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: Processes = ALONE,
    packing: bool = False,
) -> list[float]:
    """As `mean_nll`, of every lane.

    Args:
        max_tokens: that go through the model at once, those of all lanes together.
    """
    lanes = len(rows.counts)
    totals, count = torch.zeros(lanes, dtype=torch.float64, device=device), 0
    own = processes.share(split.lengths())
    # All lanes measure the same examples; a pass is shared.
    most, cost = max_tokens // lanes, PASS_TOKENS[device.type] // lanes
    parts = [part for (part,) in micro_batches([split.lengths()[own]], most, cost, packing)]
    for part in processes.even(parts, own[:0]):
        batch = collate(split, [own[row] for row in part])
        count += batch.scored
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            totals += nll_sums(model, joined([batch] * lanes).to(device), rows)
    scored = processes.total(count)
    return [processes.total(total) / scored for total in totals.tolist()]
