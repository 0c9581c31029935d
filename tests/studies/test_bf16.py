"""What is left of a step if weights are held in bf16."""

import pandas as pd
import pytest
import torch
from lora_advice.audit.settings import kept_in_bf16

from studies.bf16.weights import PAGE, TABLE, kept, page_part, round_weights

from ..conftest import REPOSITORY


def test_what_is_kept_of_a_step_by_hand():
    # Numbers in bf16 are 2^-8 apart below 1 and 2^-7 above it, and one halfway goes to the even neighbour, here 1.
    one = torch.ones(1)
    assert kept([one], 2**-9) == 0
    assert kept([one], 2**-8) == 0.5
    assert kept([one], 2**-6) == 1
    # A weight of 0 keeps every step, and the share is one of all weights.
    assert kept([one, torch.zeros(3)], 2**-10) == pytest.approx(0.75)
    # Just over half the distance becomes a whole one.
    assert kept([one], 1.01 * 2**-9) == pytest.approx(0.5 * 2 / 1.01)


def test_weights_are_numbers_of_bf16_after_a_step():
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    weight.grad = torch.ones(2)
    optimizer.step()
    round_weights(optimizer)
    assert weight.tolist() == [1.0, pytest.approx(0.099, rel=2**-8)]
    assert torch.equal(weight.data, weight.data.bfloat16().float())


@pytest.mark.parametrize("lr", [1e-6, 1e-4])
def test_the_audit_computes_what_pytorch_keeps_of_normal_weights(lr: float):
    weights = 0.02 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert kept_in_bf16(lr) == pytest.approx(kept([weights], lr), rel=0.1)


def test_the_page_is_of_the_table():
    assert page_part(pd.read_csv(REPOSITORY / TABLE)) in (REPOSITORY / PAGE).read_text(encoding="utf-8")
