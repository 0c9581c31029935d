"""The engine vLLM, which draws responses where `execution.sampler` is `vllm`: its memory and time; imports no torch.

Each process of an RL job starts one engine next to the trainer: one on each GPU of a job, or one on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

from lorabench.config.preset import Preset
from lorabench.models.specs import Dimensions, dimensions
from lorabench.models.vllm_support import max_lora_rank
from lorabench.planning.flops import longest_sequence, lora_parameters, run_work
from lorabench.runs import Condition
from lorabench.utils.gpus import GB, GPUS

# Bytes on a GPU besides those that follow from sizes (CUDA context, libraries, graphs): an assumption until it is
# measured. Bytes of a process on a CPU, measured on the tiny bases: 0.92 GB.
_ON_GPU, _ON_CPU = 2.5 * GB, 1.0 * GB
# Bytes of each logit while a token is drawn: in the type of products and in fp32, with its log-probability, probability
# and random number. So it is in the code of vLLM 0.32.
_LOGIT = 18
# Assumed for GPUs until it is measured: the share of a GPU's peaks (of products, and of reading memory) that the engine
# reaches; the least seconds of a position, in which the host schedules it and takes its tokens.
_EFFICIENCY, _POSITION_SECONDS = 0.5, 5e-3


class EngineMemory(NamedTuple):
    """The bytes that an engine holds throughout a job, on its GPU or in its process; their sum is what it takes.

    Weights and adapters are in the type of products. The overhead has the libraries, and on a GPU activations and
    distributions of the largest batch.
    """

    weights: float
    adapters: float
    cache: float
    """Keys and values of `execution.max_cache_tokens` tokens, or of the longest response if that is more."""
    overhead: float


class EngineBatch(NamedTuple):
    """The most that goes through an engine's model at once; the defaults are those of vLLM itself on a CPU.

    In vLLM they are `max_num_seqs` and `max_num_batched_tokens`, the tokens of prompts included.
    """

    responses: int = 256
    tokens: int = 4096


def uses_engine(preset: Preset, condition: Condition) -> bool:
    """Return whether the responses of a condition's runs are drawn by the engine."""
    return condition.rollouts is not None and preset.execution.sampler == "vllm"


def engine_batch(preset: Preset, condition: Condition | None = None) -> EngineBatch:
    """Return the largest batch of an engine that draws for a condition, or for an evaluation with lm-eval.

    On a GPU these are as many responses of mean length as the cache holds, but no more than a step draws, since memory
    for their distributions is taken throughout.
    """
    if preset.execution.gpu is None or condition is None:
        return EngineBatch()
    in_cache, most = int(preset.execution.max_cache_tokens / run_work(preset, condition).context), EngineBatch().tokens
    return EngineBatch(max(1, min(in_cache, condition.batch_size, most)))


def engine_memory(preset: Preset, model: str, condition: Condition | None = None) -> EngineMemory:
    """Return the bytes of each engine of a job that trains a condition, or of an evaluation with lm-eval.

    Raises:
        UserError: vLLM does not take adapters of the condition's rank.
    """
    sizes, number = dimensions(preset.models[model]), _number_bytes(preset)
    weights, adapters, cached = sizes.parameters, 0, preset.execution.max_cache_tokens
    if condition is not None:
        weights, cached = _weights(sizes, condition), max(cached, longest_sequence(preset, condition))
        room = None if condition.rank is None else max_lora_rank(condition.rank)
        adapters = lora_parameters(preset, sizes, room, condition.placement)[0]
    overhead = _ON_CPU
    if preset.execution.gpu is not None:
        # A layer's widest activations live together: those of gate, up and their product, beside the hidden ones.
        batch, wide = engine_batch(preset, condition), sizes.intermediate * max(1, sizes.active_experts)
        activations = 3 * number * batch.tokens * (sizes.hidden + wide)
        overhead = _ON_GPU + activations + _LOGIT * batch.responses * sizes.vocabulary
    return EngineMemory(number * weights, number * adapters, cached * _cache_bytes(preset, sizes), overhead)


def _weights(sizes: Dimensions, condition: Condition) -> int:
    """Return the number of weights that an engine holds: a tied unembedding that is trained is a weight of its own."""
    return sizes.parameters + sizes.tied * (condition.method == "fullft") * sizes.vocabulary * sizes.hidden


def _number_bytes(preset: Preset) -> int:
    """Return the bytes of a weight, key or value of the engine."""
    return 2 if preset.protocol.precision == "bf16" else 4


def _cache_bytes(preset: Preset, sizes: Dimensions) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    return _number_bytes(preset) * sizes.layers * 2 * sizes.kv_heads * sizes.head_dim


def handover_bytes(preset: Preset, condition: Condition) -> int:
    """Return the bytes of the files in which a job hands its weights to all of its engines in each step.

    They are the whole model in the type of its products in full fine-tuning, and in LoRA the adapter in fp32.
    """
    sizes = dimensions(preset.models[condition.model])
    if condition.rank is None:
        return _number_bytes(preset) * _weights(sizes, condition)
    return 4 * lora_parameters(preset, sizes, condition.rank, condition.placement)[0]


def engine_seconds(preset: Preset, sizes: Dimensions, tokens: float, positions: float, context: float) -> float:
    """Return the seconds in which the engine of one GPU draws a number of tokens at a number of positions.

    Linear layers read their weights at each position, or compute where that takes longer; then keys and values of the
    mean `context` are read. Both reach a share of the GPU's peak, and the host takes its own time at each position.
    """
    assert preset.execution.gpu
    gpu = GPUS[preset.execution.gpu]
    weights = positions * _number_bytes(preset) * sizes.parameters / gpu.bandwidth
    products = 2.0 * tokens * sizes.active_linear / gpu.peak_flops
    cache = tokens * context * _cache_bytes(preset, sizes) / gpu.bandwidth
    return max(positions * _POSITION_SECONDS, (max(weights, products) + cache) / _EFFICIENCY)
