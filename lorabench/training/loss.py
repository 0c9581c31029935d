"""Losses in pieces, and the loss of SFT, the NLL in nats summed over scored tokens, with its micro-batches.

Logits are computed only at tokens whose prediction counts, and for a limited number of tokens at a time. The decoder
and the unembedding are called as modules, so that LoRA on either takes effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heapreplace
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from lorabench.data.tokens import TokenizedSplit
from lorabench.errors import UserError
from lorabench.models import fused
from lorabench.models.passes import computing_only, without_peft
from lorabench.training.distributed import call_as_forward
from lorabench.training.run import Machine, deterministic

IGNORED = -100
"""Target of a position whose next token is not scored."""

PASS_TOKENS = {"cpu": 128, "cuda": 2048}
"""Fixed cost of a pass through the model by device type, in tokens' worth of time. The CPU's value was slightly better
than 32 and 64 on the laptop preset's batches; the GPU's is assumed."""


def micro_batches(lengths: np.ndarray, max_tokens: int, pass_tokens: int) -> list[np.ndarray]:
    """Split examples, given their lengths in tokens, into the micro-batches of least cost, by dynamic programming.

    A micro-batch costs its rows times its longest row, plus `pass_tokens`. Unless it is a single example, this product
    is at most `max_tokens`. Returned are the positions of each micro-batch's examples, short examples first.
    """
    order = np.argsort(lengths, kind="stable")
    # By the number of examples, shortest first: the least cost, and where the last micro-batch then starts.
    costs, starts = np.zeros(len(order) + 1), np.zeros(len(order) + 1, np.int64)
    for end, longest in enumerate(lengths[order].tolist(), 1):
        first = min(end - 1, max(0, end - max_tokens // max(1, longest)))
        candidates = costs[first:end] + np.arange(end - first, 0, -1) * longest
        best = int(candidates.argmin())
        costs[end], starts[end] = candidates[best] + pass_tokens, first + best
    parts, end = [], len(order)
    while end:
        parts.append(order[starts[end] : end])
        end = int(starts[end])
    return parts[::-1]


def packed_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Deal examples, given their lengths in tokens, into micro-batches of similar size, which have no padding.

    They are as few as it takes for none to have more than `max_tokens`, unless it is a single example. Returned are the
    positions of each micro-batch's examples.
    """
    least = min(len(lengths), ceil(lengths.sum() / max_tokens))
    parts: list[tuple[int, int, list[int]]] = []
    for count in range(least, len(lengths) + 1):
        parts = [(0, number, []) for number in range(count)]
        for example in np.argsort(-lengths, kind="stable").tolist() if count else ():
            tokens, number, part = parts[0]
            part.append(example)
            heapreplace(parts, (tokens + int(lengths[example]), number, part))
        if all(tokens <= max_tokens or len(part) == 1 for tokens, _, part in parts):
            break
    return [np.array(part) for _, _, part in sorted(parts, key=lambda part: part[1]) if part]


class Batch(NamedTuple):
    """The inputs of a model and their next-token targets, each tensor (rows, width), padded on the right.

    Targets are `IGNORED` where the next token is not scored. No attention mask is needed, since attention is causal.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...] | None = None
    """The tokens of each example, where they share a row without padding."""

    @property
    def of_model(self) -> dict[str, Any]:
        """The arguments of a model's forward pass."""
        sequences = [(length, ()) for length in self.lengths or ()]
        return {"input_ids": self.inputs} | (fused.shared_row(sequences, self.inputs.device) if sequences else {})

    @property
    def scored(self) -> int:
        """The number of scored targets."""
        return int((self.targets != IGNORED).sum())


def collate(
    split: TokenizedSplit,
    examples: Sequence[int] | np.ndarray,
    device: torch.device | None = None,
    packed: bool = False,
) -> Batch:
    """Build a batch of examples, given by index, in a row each or in one row.

    No examples give one token without a target.
    """
    tokens = [split.example(int(index)) for index in examples]
    # An example's last token is only a target.
    lengths = [len(ids) - 1 for ids, _ in tokens]
    places: list[tuple[int, int]] = [(row, 0) for row in range(len(tokens))]
    shape = max(1, len(tokens)), max([1, *lengths])
    if packed:
        places = [(0, int(start)) for start in np.cumsum([0, *lengths])[:-1]]
        shape = 1, max(1, sum(lengths))
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    for (row, start), (ids, scored) in zip(places, tokens, strict=True):
        here = slice(start, start + len(ids) - 1)
        inputs[row, here], targets[row, here] = ids[:-1], np.where(scored[1:], ids[1:], IGNORED)
    in_a_row = (tuple(lengths) or (1,)) if packed else None
    return Batch(torch.as_tensor(inputs, device=device), torch.as_tensor(targets, device=device), in_a_row)


def scored_by_example(split: TokenizedSplit) -> np.ndarray:
    """Count the scored next tokens of each example, (examples,); an example's first token is never predicted."""
    before = np.concatenate([[0], np.cumsum(split.scored)])
    counts: np.ndarray = before[split.offsets[1:]] - before[split.offsets[:-1]] - split.scored[split.offsets[:-1]]
    return counts


MAX_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Largest number of logits computed at once, by device type: 64 and 256 MiB in fp32, a few times that with gradients.
Smaller pieces make the products of the unembedding slow, since its weights are read for each piece. The CPU's value was
measured against a quarter of it; the GPU's is assumed."""


OfLogits = Callable[[Tensor, slice], Tensor]
"""A function that computes numbers of some tokens, (tokens, ...), from their logits, (tokens, vocabulary), in fp32; the
slice says which of all tokens they are."""


def backward_in_pieces(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    tokens: Tensor,
    compute: OfLogits,
    loss: Callable[[Tensor, slice], Tensor],
    autocast: torch.dtype | None,
    at_once: int,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a loss that is a sum over tokens; return it, and the numbers of all tokens.

    `tokens` are indices into (rows x length) of the positions whose logits are computed, (tokens,). From the logits of
    `at_once` tokens at most follow the numbers that `compute` returns, and from these a part of the loss, a scalar.
    """
    cast = torch.autocast(tokens.device.type, dtype=autocast, enabled=autocast is not None)
    if len(tokens) <= at_once or isinstance(model, FSDPModule):
        with cast:
            numbers = call_as_forward(model, of_tokens, inputs, tokens, compute, at_once)
        total = loss(numbers, slice(None))
        total.backward()
        return total.detach(), numbers.detach()
    with cast:
        hidden = without_peft(model).get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[tokens]
    # The backward pass goes through the unembedding piece by piece, then once through the decoder.
    leaf, head = hidden.detach().requires_grad_(), without_peft(model).get_output_embeddings()
    total, parts = torch.zeros((), device=tokens.device), []
    for start in range(0, len(tokens), at_once):
        piece = slice(start, start + at_once)
        with cast:
            numbers = compute(head(leaf[piece]), piece)
        part = loss(numbers, piece)
        part.backward()
        total += part.detach()
        parts.append(numbers.detach())
    hidden.backward(leaf.grad)
    return total, torch.cat(parts)


def of_tokens(
    model: nn.Module, inputs: Mapping[str, Tensor], tokens: Tensor, compute: OfLogits, at_once: int
) -> Tensor:
    """Compute numbers of tokens from their logits; the arguments are those of `backward_in_pieces`.

    The logits of more than `at_once` tokens are computed in pieces, and in the backward pass again, piece by piece. The
    unembedding is called once nevertheless, so that FSDP communicates equally often in processes with other numbers of
    pieces.
    """
    hidden = without_peft(model).get_decoder()(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[tokens]
    head = without_peft(model).get_output_embeddings()
    if len(hidden) <= at_once:
        return compute(head(hidden), slice(None))
    forward = head.forward

    def numbers(part: Tensor, start: int) -> Tensor:
        return compute(forward(part), slice(start, start + at_once))

    def in_pieces(hidden: Tensor) -> Tensor:
        parts = zip(hidden.split(at_once), range(0, len(hidden), at_once), strict=True)
        return torch.cat([checkpoint(numbers, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])

    head.forward = in_pieces
    try:
        whole: Tensor = head(hidden)
    finally:
        head.forward = forward
    return whole


def add_gradient(
    model: nn.Module, batch: Batch, divisor: int, autocast: torch.dtype | None, max_logits: int | None
) -> Tensor:
    """Add the gradient of a batch's NLL divided by `divisor`, and return this quotient, a scalar on the device."""
    inputs, (tokens, targets) = batch.of_model, _scored(batch)
    at_once = len(tokens) if max_logits is None else max(1, max_logits // without_peft(model).config.vocab_size)
    # The context includes the backward pass, since recomputed layers read the tokens again.
    with computing_only(model, tokens):
        return backward_in_pieces(
            model, inputs, tokens, _nlls(model, targets), lambda nlls, _: nlls.sum() / divisor, autocast, at_once
        )[0]


def batch_gradient(
    model: nn.Module, split: TokenizedSplit, examples: np.ndarray, machine: Machine
) -> tuple[float, int, int]:
    """Compute the gradient of the token-weighted NLL of some examples, given by index, micro-batch by micro-batch.

    Each process computes a share. All return the NLL in nats per scored token, and the tokens and scored tokens.
    """
    processes, device, lengths = machine.processes, machine.device, split.lengths()
    share = examples[processes.share(lengths[examples])]
    parts, packed = _micro_batches(model, lengths[share], machine)
    batches = [
        collate(split, part, device, packed) for part in processes.even((share[part] for part in parts), share[:0])
    ]
    counts = [lengths[share].sum(), sum(batch.scored for batch in batches)]
    tokens, scored = processes.gather(counts).sum(0).astype(int).tolist()
    nll = torch.zeros((), dtype=torch.float64, device=device)
    with deterministic(device):
        for batch in batches:
            nll += add_gradient(model, batch, scored, machine.autocast, MAX_LOGITS[device.type])
    return float(processes.gather([nll.item()]).sum()), tokens, scored


@torch.no_grad()
def example_nlls(model: nn.Module, split: TokenizedSplit, machine: Machine) -> np.ndarray:
    """Return the NLL of each example of a split over its scored tokens, in nats: (examples,), in all processes."""
    processes, kind = machine.processes, machine.device.type
    counts, share = scored_by_example(split), processes.share(split.lengths())
    nats, owners = [np.zeros(0)], [share[:0]]
    at_once = max(1, MAX_LOGITS[kind] // without_peft(model).config.vocab_size)
    parts, packed = _micro_batches(model, split.lengths()[share], machine)
    for examples in processes.even((share[part] for part in parts), share[:0]):
        batch = collate(split, examples, machine.device, packed)
        tokens, targets = _scored(batch)
        with machine.cast(), computing_only(model, tokens):
            nlls = call_as_forward(model, of_tokens, batch.of_model, tokens, _nlls(model, targets), at_once)
            nats.append(nlls.double().cpu().numpy())
        owners.append(np.repeat(examples, counts[examples]))
    sums = np.bincount(np.concatenate(owners), weights=np.concatenate(nats), minlength=len(split))
    # Each process has measured its share, and has 0 for the examples of the others.
    return np.sum(processes.gather(sums), 0)  # type: ignore[no-any-return]


def mean_nll(model: nn.Module, split: TokenizedSplit, machine: Machine) -> float:
    """Return the token-weighted NLL of a whole split in nats per scored token; see `example_nlls`."""
    return float(example_nlls(model, split, machine).sum()) / int(scored_by_example(split).sum())


def _scored(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the indices of a batch's scored tokens into (rows x length), and the targets there, both (scored,)."""
    targets = batch.targets.flatten()
    tokens = (targets != IGNORED).nonzero().squeeze(1)
    return tokens, targets[tokens]


def _micro_batches(model: nn.Module, lengths: np.ndarray, machine: Machine) -> tuple[list[np.ndarray], bool]:
    """Return the positions of the examples of each micro-batch, and whether the examples share a row."""
    if share_rows(model, machine):
        return packed_batches(lengths, machine.max_batch_tokens), True
    return micro_batches(lengths, machine.max_batch_tokens, PASS_TOKENS[machine.device.type]), False


def share_rows(model: nn.Module, machine: Machine) -> bool:
    """Return whether sequences share a row without seeing each other, for which attention has kernels in bf16."""
    return fused.is_fused(model) and machine.autocast == torch.bfloat16


def _nlls(model: nn.Module, targets: Tensor) -> OfLogits:
    """Return the function that computes the NLL of each target."""
    if fused.is_fused(model):
        return lambda logits, piece: -fused.logprobs_and_entropies(logits, targets[piece])[0]
    return lambda logits, piece: nn.functional.cross_entropy(logits.float(), targets[piece], reduction="none")


def check_plain_head(model: nn.Module) -> None:
    """Raise UserError if a model scales or caps its logits after the unembedding, which the loss would not do."""
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits ({name}); such models are not supported yet")
