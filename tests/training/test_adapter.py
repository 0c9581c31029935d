"""The measures of a step against dense matrices, over real optimizer steps on a PEFT model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorabench.models.lora import adapter_pairs
from lorabench.training.sft import measured_step


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall = torch.nn.Linear(20, 7), torch.nn.Linear(7, 16)

    def forward(self, x):
        return self.tall(torch.tanh(self.wide(x)))


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=32.0, target_modules=["wide", "tall"], lora_dropout=0.0)
    model = get_peft_model(Net(), config)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(12, 20, generator=generator), torch.randint(16, (12,), generator=generator)
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs), targets).backward()


def dense(model):
    """Return LoRA's change of W for each layer."""
    return {name: scaling * (b @ a).detach().double() for name, (a, b, scaling) in adapter_pairs(model).items()}


def trained(model, of=lambda parameter: parameter.detach()):
    return {name: of(p).clone() for name, p in model.named_parameters() if p.requires_grad}


def test_measures_agree_with_dense_matrices_and_change_no_training():
    (model, optimizer), (unprobed, other_optimizer) = adapted(), adapted()
    pairs = adapter_pairs(model)
    assert len(pairs) == 2
    initial = {name: a.detach().clone() for name, (a, _, _) in pairs.items()}
    for step in range(3):
        backward(model, step)
        gradients, before, old = trained(model, lambda parameter: parameter.grad), dense(model), trained(model)
        measured = measured_step(pairs, initial, optimizer)
        after, new = dense(model), trained(model)
        update = sum((after[name] - before[name]).square().sum() for name in pairs) ** 0.5
        moved = [((a - initial[name]).norm() / initial[name].norm()).item() for name, (a, _, _) in pairs.items()]
        larger = [torch.linalg.matrix_norm(b, 2) > torch.linalg.matrix_norm(a, 2) for a, b, _ in pairs.values()]
        descent = -sum(((new[name] - old[name]).double() * gradients[name]).sum() for name in new)
        assert measured["update_norm"] == pytest.approx(update.item(), rel=1e-4)
        assert measured["a_moved"] == pytest.approx(sum(moved) / 2, rel=1e-5)
        assert measured["b_over_a"] == sum(map(float, larger)) / 2
        assert measured["descent"] == pytest.approx(descent.item(), rel=1e-5)
        backward(unprobed, step)
        other_optimizer.step()
        assert all(torch.equal(value, new[name]) for name, value in trained(unprobed).items())
    assert all(value > 0 for name, value in measured.items() if name != "b_over_a")
