"""Fused layers compute what transformers' do, alone and with examples that share a row, and leave caches alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorabench.config.inputs import TinyModel
from lorabench.data.tokens import TokenizedSplit
from lorabench.models import fused, lora
from lorabench.models.base import load_model
from lorabench.models.passes import recompute_activations, trained_parameters
from lorabench.training.loss import add_gradient, collate, example_nlls, packed_batches
from lorabench.training.run import Machine

from .conftest import DEVICES

pytestmark = pytest.mark.usefixtures("varlen_on_cpu")


def prepared(name, rank, fuse, bf16=False, again=False):
    """Return a tiny base as a job trains it, with a B of LoRA that is not zero."""
    model = load_model(TinyModel(kind="tiny", name=name))
    if fuse:
        fused.fuse(model)
    if again:
        recompute_activations(model, keeping=1)
    if rank is None:
        return model
    if bf16:
        lora.hold_in_bf16(model)
    model = lora.add_lora(model, rank, "all", 32.0, True, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    lora.use_fast_products(model)
    return model


def some_examples():
    """Return nine examples of different lengths, of whose tokens some are scored."""
    rng = np.random.default_rng(0)
    ends = np.cumsum([0, *rng.integers(2, 90, size=9)])
    return TokenizedSplit(rng.integers(1024, size=ends[-1]), rng.random(ends[-1]) < 0.6, ends)


def gradient(model, packed, autocast=None):
    """Return the loss of all examples and its gradient, with logits in pieces."""
    batch = collate(some_examples(), range(9), next(model.parameters()).device, packed)
    loss = add_gradient(model, batch, batch.scored, autocast, 1 << 17)
    return loss, torch.cat([parameter.grad.flatten() for parameter in trained_parameters(model).values()]).cpu()


def error(gradient, reference):
    return float((gradient - reference).norm() / reference.norm())


@pytest.mark.parametrize(("name", "rank"), [("llama-64", None), ("qwen-64", 8)])
@pytest.mark.parametrize("again", [False, True])
def test_loss_and_gradient_are_those_of_transformers_in_fp32(name, rank, again):
    loss, reference = gradient(prepared(name, rank, fuse=False), packed=False)
    for packed in (False, True):
        own_loss, own = gradient(prepared(name, rank, fuse=True, again=again), packed)
        assert float(own_loss) == pytest.approx(float(loss), rel=1e-6)
        assert error(own, reference) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "rank"), [("llama-64", 8), ("qwen-64", None)])
def test_rounding_to_bf16_is_no_larger_than_that_of_transformers(name, rank, device):
    """On a GPU the functions are compiled."""
    bf16 = torch.bfloat16
    _, reference = gradient(prepared(name, rank, fuse=False), packed=False)
    plain, model = (prepared(name, rank, fuse, bf16=True).to(device) for fuse in (False, True))
    _, rounded = gradient(plain, packed=False, autocast=bf16)
    _, own = gradient(model, packed=True, autocast=bf16)
    assert error(own, reference) < 1.2 * error(rounded, reference) < 0.05
    # Evaluations share rows too, of at most 200 tokens; some examples have over 80.
    machines = [Machine(torch.device(device), tokens, autocast=bf16) for tokens in (200, 10_000)]
    apart, together = (example_nlls(model, some_examples(), machine) for machine in machines)
    assert apart == pytest.approx(together, rel=0.02, abs=0.1)


def test_log_probabilities_and_entropies_are_those_of_a_softmax():
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    targets = torch.arange(7)
    own, entropies = fused.logprobs_and_entropies(logits, targets)
    distribution = torch.log_softmax(logits, -1)
    expected = distribution.gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(entropies, -(distribution.exp() * distribution).sum(-1))
    weights = torch.arange(7.0)
    own_gradient, expected_gradient = (
        torch.autograd.grad((weights * numbers.exp()).sum(), logits)[0] for numbers in (own, expected)
    )
    torch.testing.assert_close(own_gradient, expected_gradient)


def test_passes_with_a_cache_and_other_models_are_left_alone():
    ids = torch.arange(12)[None]
    plain, own = prepared("qwen-64", None, fuse=False), prepared("qwen-64", None, fuse=True)
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=True).logits for model in (plain, own)]
    assert torch.equal(*logits)
    assert not fused.is_fused(prepared("moe-128", None, fuse=True))
    model = load_model(TinyModel(kind="tiny", name="llama-64"))
    model.config.hidden_act = "gelu"
    fused.fuse(model)
    assert not fused.is_fused(model)


@given(lengths=st.lists(st.integers(1, 40), max_size=30), most=st.integers(1, 100))
def test_examples_share_as_few_rows_as_hold_them(lengths, most):
    parts = packed_batches(np.array(lengths, np.int64), most)
    assert sorted(np.concatenate([np.zeros(0, np.int64), *parts]).tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in part) for part in parts]
    assert all(size <= most or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    assert max(sizes, default=0) - min(sizes, default=0) <= max(lengths, default=0)
    assert len(parts) == 1 or sum(lengths) > most or not lengths


CASES = {
    "_add_norm": lambda x, y, w, s: (x, y.bfloat16(), w, 1e-6, torch.bfloat16),
    "_add_norm_backward": lambda x, y, w, s: (y.bfloat16(), x, y, w, s, torch.bfloat16),
    "_rotate": lambda x, y, w, s: (x[:, :, None], w, y[:1], x[:1], 1e-6),
    "_rotate_backward": lambda x, y, w, s: (x[:, :, None], y[:, :, None], w, y[:1], x[:1], 1e-6),
    "_swiglu_backward": lambda x, y, w, s: (x, y, x + y),
    "_choose": lambda x, y, w, s: (x[0], torch.arange(len(x[0]))[:, None]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_functions_are_the_plain_ones(name):
    """They are compiled for a CPU here, with the options that hold for a GPU, and for a second size."""
    function = getattr(fused, name)
    for length in (5, 9):
        x, y = torch.randn(2, 2, length, 64, generator=torch.Generator().manual_seed(length))
        arguments = CASES[name](x, y, torch.linspace(0.5, 1.5, 64), torch.rsqrt(y.square().mean(-1, keepdim=True)))
        plain, compiled = function(*arguments), fused._compiled(function)(*arguments)
        for expected, own in zip(*(r if isinstance(r, tuple) else (r,) for r in (plain, compiled)), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-2 if own.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
