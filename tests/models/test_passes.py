"""Attention in blocks and a last MLP of fewer tokens have the losses and gradients of transformers and PyTorch."""

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from lorabench.models.attention import attend_in_blocks
from lorabench.models.passes import computing_only, recompute_activations
from lorabench.training.loss import IGNORED, Batch, add_gradient

from ..training.conftest import base_of

WIDTH = 190


def batch_of(scored: int) -> Batch:
    """Return two rows of tokens, of which the first has `scored` scored ones and the second has one less."""
    ids = torch.randint(3, 1000, (2, WIDTH + 1), generator=torch.Generator().manual_seed(0))
    targets = ids[:, 1:].clone()
    targets[0, :10] = targets[0, 10 + scored :] = IGNORED
    targets[1, : WIDTH - (scored - 1)] = IGNORED
    return Batch(ids[:, :-1], targets)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["moe-128", "gemma"])
def test_loss_and_gradients_are_those_of_all_tokens(name):
    model, batch = base_of(name), batch_of(7)
    model.set_attn_implementation("sdpa")
    logits = model(batch.inputs, use_cache=False).logits.flatten(0, 1)
    expected = functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    expected.backward()
    theirs = gradients(model)
    attend_in_blocks(model)
    for prepare in (lambda model: None, recompute_activations):
        model.zero_grad()
        prepare(model)
        loss = add_gradient(model, batch, 1, None, None)
        assert_close(loss, expected, rtol=1e-6, atol=0)
        own = gradients(model)
        assert own.keys() == theirs.keys()
        largest = max(gradient.norm() for gradient in theirs.values())
        for key, gradient in theirs.items():
            assert (own[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * largest, key


def test_the_last_mlp_has_the_scored_tokens_in_front_of_it_and_otherwise_the_models_own_computes_all():
    model, batch, rows = base_of("llama-128"), batch_of(7), []
    last = model.get_decoder().layers[-1]
    own = last.mlp.forward
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.register_forward_hook(lambda _, given, result: rows.append(given[0].shape[:-1].numel()))
    add_gradient(model, batch, 1, None, None)
    assert rows == [2 * WIDTH, 2 * WIDTH, 7 + 6]
    # Outside the context, also after an error, and without a scored token the model's own forward pass is back.
    with pytest.raises(KeyError), computing_only(model, torch.tensor([3])):
        raise KeyError(last.mlp.forward == own)
    assert last.mlp.forward == own
    with computing_only(model, torch.zeros(0, dtype=torch.long)):
        model(batch.inputs)
    assert rows[3:] == [2 * WIDTH] * 3
