"""The settings of the engine for a sweep, from its preset and machine."""

from __future__ import annotations

import torch

from lorabench.config.models import HubModel
from lorabench.models.base import model_location
from lorabench.models.vllm_support import max_lora_rank
from lorabench.planning.engine import engine_memory
from lorabench.planning.lane_count import lane_count
from lorabench.training.rl.engine.process import EngineSettings
from lorabench.training.sweep import SweepContext

# On a CPU vLLM does not look at the share.
_SHARE_OF_A_CPU = 0.5


def engine_settings(context: SweepContext, longest: int, finds_texts: bool) -> EngineSettings:
    """Return the settings of the engine of a sweep.

    Args:
        longest: tokens of the longest prompt with its response.
        finds_texts: whether a text may end a response.
    """
    machine, condition, preset = context.machine, context.sweep.condition, context.plan.preset
    spec = context.layout.model(condition.model)
    on_gpu = machine.device.type == "cuda"
    lanes = (
        1 if machine.processes.sharded else lane_count(preset, context.sweep, machine.processes.count if on_gpu else 0)
    )
    memory = engine_memory(preset, context.sweep)
    share = _SHARE_OF_A_CPU
    if on_gpu:
        share = min(0.95, memory.total / torch.cuda.get_device_properties(machine.device).total_memory)
    return EngineSettings(
        model=model_location(spec),
        revision=spec.revision if isinstance(spec, HubModel) else None,
        trust_remote_code=getattr(spec, "trust_remote_code", False),
        dtype="bfloat16" if preset.protocol.precision == "bf16" else "float32",
        max_length=longest,
        cache_bytes=int(memory.cache),
        memory_share=share,
        max_rank=None if condition.rank is None else max_lora_rank(condition.rank),
        lanes=lanes,
        tokenizer=model_location(spec) if finds_texts else None,
        device=machine.device.index or 0 if on_gpu else None,
        threads=max(1, preset.execution.threads // machine.processes.count),
    )
