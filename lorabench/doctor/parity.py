"""Losses, gradients and log-probabilities of this device against an independent computation on the CPU.

The reference is plain transformers with eager attention and PEFT's own forward pass of LoRA, in fp32 on the CPU. What
is compared with it is what runs compute: this project's attention, LoRA, loss and sampler, on this device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from lorabench.doctor.bench import (
    Bench,
    gradients,
    prepared,
    random_model,
    random_split,
    with_method,
)
from lorabench.doctor.limits import BF16_ERROR, FP32_ERROR
from lorabench.doctor.record import Check
from lorabench.doctor.subject import CPU_EXPERTS, Subject
from lorabench.doctor.verdict import at_most
from lorabench.models.dimensions import Dimensions
from lorabench.training.rl.sampler import Request, Response, Stop, sample
from lorabench.training.sft import batch_gradient

Precision = Literal["fp32", "bf16"]
Sampler = Callable[..., list[Response]]

# The CPU computes the reference too, so a few layers and tokens have to do; the layers keep their sizes.
_LAYERS, _ROWS, _LENGTH = 2, 2, 64
_NEW_TOKENS, _RESPONSES = 8, 4

_CPU = torch.device("cpu")


def check_parity(bench: Bench, subject: Subject, precision: Precision) -> Check:
    """Compare loss and gradient of a training step on this device with the reference."""
    condition, sizes = subject.condition, _shortened(subject.sizes, precision)
    reference = with_method(random_model(sizes, _CPU, plain=True), condition, bench.preset)
    tested = with_method(random_model(sizes, bench.device), condition, bench.preset)
    tested.load_state_dict(reference.state_dict())
    split = random_split(_ROWS, _LENGTH, sizes.vocabulary)
    expected, expected_gradients = _plain_gradients(reference, torch.from_numpy(split.ids).view(_ROWS, _LENGTH + 1))
    machine = replace(bench.machine, max_batch_tokens=_ROWS * (_LENGTH + 1))
    tested, autocast = prepared(tested, condition), torch.bfloat16 if precision == "bf16" else None
    with without_tf32(precision):
        nll, _, _ = batch_gradient(tested, split, np.arange(_ROWS), machine, autocast)
    of_loss = abs(nll / expected - 1)
    of_gradient = relative_error(gradients(tested), expected_gradients)
    limit = FP32_ERROR if precision == "fp32" else BF16_ERROR
    return at_most(
        f"parity in {precision}: {subject.title}",
        max(of_loss, of_gradient),
        limit,
        "relative error",
        f"of plain transformers and PEFT in fp32 on the CPU, the loss differs by {of_loss:.1e} and the gradient by "
        f"{of_gradient:.1e}",
    )


def check_sampler(bench: Bench, subject: Subject, sampler: Sampler = sample) -> Check:
    """Compare the log-probabilities that the sampler records with those that the reference gives the same tokens."""
    condition, sizes = subject.condition, _shortened(subject.sizes, "fp32")
    reference = with_method(random_model(sizes, _CPU, plain=True), condition, bench.preset).eval()
    tested = with_method(random_model(sizes, bench.device), condition, bench.preset)
    tested.load_state_dict(reference.state_dict())
    ids = np.random.default_rng(2).integers(sizes.vocabulary, size=2 * _LENGTH)
    prompts = [tuple(ids[:_LENGTH].tolist()), tuple(ids[_LENGTH:].tolist())]
    requests = [Request(prompt, (0, seat)) for prompt in prompts for seat in range(_RESPONSES)]
    with without_tf32("fp32"):
        drawn = sampler(prepared(tested, condition), None, requests, Stop((), _NEW_TOKENS), 1 << 16)
    found, expected = (np.concatenate(parts) for parts in zip(*_logprobs(reference, requests, drawn), strict=True))
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return at_most(
        f"sampler in fp32: {subject.condition.model}",
        error,
        FP32_ERROR,
        "relative error",
        f"the log-probabilities of {len(found)} drawn tokens differ by {error:.1e} from those of plain transformers",
    )


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two gradients over the norm of the expected one.

    Raises:
        ValueError: they are of other weights.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"gradients are of other weights: {min(found.keys() ^ expected.keys())}")
    pairs = [(found[name].cpu().double(), expected[name].double()) for name in expected]
    difference = sum(float((one - other).square().sum()) for one, other in pairs)
    return float((difference / sum(float(other.square().sum()) for _, other in pairs)) ** 0.5)


@contextmanager
def without_tf32(precision: Precision) -> Iterator[None]:
    """Within the context, products in fp32 on a GPU are exact if the precision is fp32, as in a preset in fp32."""
    settings: Any = torch.backends.cuda.matmul
    before = settings.allow_tf32
    if precision == "fp32":
        settings.allow_tf32 = False
    try:
        yield
    finally:
        settings.allow_tf32 = before


def _shortened(sizes: Dimensions, precision: Precision) -> Dimensions:
    """Return the sizes with few layers and experts.

    In bf16 all experts are active: rounding would else send some tokens to other experts than in fp32, which is no
    error and changes the gradient by more than rounding does.
    """
    few = replace(sizes, layers=min(sizes.layers, _LAYERS), experts=min(sizes.experts, CPU_EXPERTS))
    if not sizes.experts:
        return few
    return replace(
        few, active_experts=few.experts if precision == "bf16" else min(few.active_experts, few.experts // 2)
    )


def _plain_gradients(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of sequences in nats per token, and the gradients of the trained weights by name."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@torch.no_grad()
def _logprobs(
    model: Any, requests: Sequence[Request], responses: Sequence[Response]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the recorded log-probabilities of each response's tokens, and those that the model gives them."""
    for request, response in zip(requests, responses, strict=True):
        ids = torch.tensor([[*request.prompt, *response.tokens.tolist()]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt) - 1 : -1]
        given = logits.log_softmax(-1).gather(-1, torch.from_numpy(response.tokens)[:, None]).squeeze(-1)
        yield response.logprobs, given.numpy()
