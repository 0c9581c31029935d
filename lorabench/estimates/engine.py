"""The engine vLLM that draws responses where `execution.sampler` is `vllm`: its memory. Does not import torch.

Each process of an RL job starts one engine beside the trainer: on a GPU job one on each GPU, on a CPU one for the job.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabench.config.preset import Preset
from lorabench.estimates.lengths import longest_sequence
from lorabench.models.dimensions import Dimensions, dimensions
from lorabench.runs import Condition, Sweep
from lorabench.utils.gpus import GB

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM has room for adapters; others take the next one."""

# Bytes on a GPU beside weights, adapters and cache (CUDA context, activations, graphs): an assumption until it is
# measured. Bytes of a process on a CPU, measured on the tiny bases: 0.92 GB.
_ON_GPU, _ON_CPU = 2.5 * GB, 1.0 * GB


@dataclass(frozen=True)
class EngineMemory:
    """The bytes that an engine holds throughout a job: on its GPU, or on a CPU in its process."""

    weights: float
    """The whole model in the type in which products are computed."""
    adapters: float
    """LoRA of all lanes in the same type; 0 in full fine-tuning."""
    cache: float
    """Keys and values of `execution.max_cache_tokens` tokens, or of the longest response if that is more."""
    overhead: float
    """Everything else, such as the libraries and activations."""

    @property
    def total(self) -> float:
        """All bytes of the engine."""
        return self.weights + self.adapters + self.cache + self.overhead


def uses_engine(preset: Preset, condition: Condition) -> bool:
    """Return whether the responses of a condition's runs are drawn by the engine."""
    return condition.rollouts is not None and preset.execution.sampler == "vllm"


def engine_memory(preset: Preset, sweep: Sweep, lanes: int = 1) -> EngineMemory:
    """Return the bytes of each engine of a sweep's job, which draws the responses of `lanes` runs at once."""
    condition = sweep.condition
    sizes = dimensions(preset.models[condition.model])
    adapters = 0
    if condition.rank is not None and condition.placement is not None:
        rank = min((rank for rank in RANKS if rank >= condition.rank), default=condition.rank)
        adapters = lanes * sizes.lora(condition.placement, rank, preset.protocol.include_unembedding)[0]
    number = number_bytes(preset)
    return EngineMemory(
        weights=number * sizes.parameters,
        adapters=number * adapters,
        cache=max(longest_sequence(preset, condition), preset.execution.max_cache_tokens) * cache_bytes(preset, sizes),
        overhead=_ON_CPU if preset.execution.gpu is None else _ON_GPU,
    )


def number_bytes(preset: Preset) -> int:
    """Return the bytes of a weight, key or value of the engine."""
    return 2 if preset.protocol.precision == "bf16" else 4


def cache_bytes(preset: Preset, sizes: Dimensions) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return number_bytes(preset) * sizes.layers * 2 * sizes.kv_heads * sizes.head_dim


def handover_bytes(preset: Preset, sweep: Sweep, lanes: int = 1) -> int:
    """Return the bytes of shared memory in which a job hands its weights to all of its engines in each step.

    They are the whole model in the type of its products in full fine-tuning, and in LoRA the adapters of all lanes in
    fp32.
    """
    condition = sweep.condition
    sizes = dimensions(preset.models[condition.model])
    if condition.rank is None or condition.placement is None:
        return number_bytes(preset) * sizes.parameters
    return 4 * lanes * sizes.lora(condition.placement, condition.rank, preset.protocol.include_unembedding)[0]
