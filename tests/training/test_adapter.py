"""The measures of a step against dense matrices, over real optimizer steps on a PEFT model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorabench.models.lora import adapter_pairs
from lorabench.models.passes import trained_parameters
from lorabench.training.sft import measured_step


def dense(pairs):
    """Return LoRA's change of W for each layer."""
    return {name: scaling * (b @ a).detach().double() for name, (a, b, scaling) in pairs.items()}


def test_measures_agree_with_dense_matrices():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 7), torch.nn.Tanh(), torch.nn.Linear(7, 16))
    model = get_peft_model(net, LoraConfig(r=3, lora_alpha=32.0, target_modules=["0", "2"], lora_dropout=0.0))
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    pairs = adapter_pairs(model)
    assert len(pairs) == 2
    initial = {name: a.detach().clone() for name, (a, _, _) in pairs.items()}
    for _ in range(3):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(12, 20)), torch.randint(16, (12,))).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        before, old = dense(pairs), {name: parameter.detach().clone() for name, parameter in parameters.items()}
        measured = measured_step(pairs, initial, optimizer)
        after = dense(pairs)
        update = sum((after[name] - before[name]).square().sum() for name in pairs) ** 0.5
        moved = [((a - initial[name]).norm() / initial[name].norm()).item() for name, (a, _, _) in pairs.items()]
        larger = [torch.linalg.matrix_norm(b, 2) > torch.linalg.matrix_norm(a, 2) for a, b, _ in pairs.values()]
        descent = -sum(((new - old[name]).double() * gradients[name]).sum() for name, new in parameters.items())
        assert measured["update_norm"] == pytest.approx(update.item(), rel=1e-4)
        assert measured["a_moved"] == pytest.approx(sum(moved) / 2, rel=1e-5)
        assert measured["b_over_a"] == sum(map(float, larger)) / 2
        assert measured["descent"] == pytest.approx(descent.item(), rel=1e-5)
    assert all(value > 0 for name, value in measured.items() if name != "b_over_a")
