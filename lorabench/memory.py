"""Memory of a job, estimated from the sizes of its model: what decides how many GPUs it needs. No torch.

Per process: fp32 master weights; gradients and Adam's two moments of what is trained; the bf16 copies that autocast
makes; activations of one micro-batch; logits of its scored tokens; in RL the cache of keys and values. With several
GPUs weights, gradients and moments are split over them (FSDP), activations and logits are not.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lorabench import cost
from lorabench.config import Preset
from lorabench.errors import UserError
from lorabench.gpus import GB, GPUS
from lorabench.models.dimensions import Dimensions, dimensions

if TYPE_CHECKING:
    from lorabench.plan import Condition, Sweep

# Of a GPU's memory; the rest is the driver's, or lost between blocks.
USABLE = 0.92


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU (or in the process, on a CPU)."""

    weights: float
    gradients: float
    moments: float
    copies: float
    activations: float
    logits: float
    cache: float

    @property
    def total(self) -> float:
        """All together: an upper bound of the peak."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def sweep_memory(preset: Preset, sweep: Sweep, gpus: int = 1) -> Memory:
    """Peak memory of a sweep's job, on each of its GPUs."""
    condition, execution = sweep.condition, preset.execution
    sizes = dimensions(preset.models[condition.model])
    bf16 = preset.protocol.precision == "bf16"
    trained = cost.trained_parameters(preset, condition)
    lora = condition.method == "lora"
    lanes = min(execution.lanes, sweep.n_runs) if lora and condition.rollouts else 1
    tokens, scored = _micro_batch(preset, condition)
    gathered = 2 * 4 * sizes.layer_parameters if gpus > 1 else 0
    linear = sum(matrix.parameters for matrix in sizes.matrices)
    again, layer = execution.activation_checkpointing, _activation_bytes(sizes, condition, bf16)
    # With checkpoints a layer keeps its input; what it needs in between is there for one layer at a time.
    kept = sizes.layers * 4 * sizes.hidden + layer if again else sizes.layers * layer
    return Memory(
        weights=4 * (sizes.parameters + (trained * lanes if lora else 0)) / gpus + gathered,
        gradients=4 * trained / gpus,
        moments=8 * trained * lanes / gpus,
        copies=2 * linear if bf16 and not (again and (lora or gpus > 1)) else 0,
        activations=tokens * kept,
        logits=scored * sizes.vocabulary * (16 if condition.rollouts else 12),
        cache=_cache(preset, sweep, sizes, lanes, bf16) / gpus,
    )


def gpus_needed(preset: Preset, sweep: Sweep) -> int:
    """The smallest power of two of GPUs that holds a sweep's job; 0 on a CPU.

    Raises:
        UserError: not even `execution.max_gpus` hold it.
    """
    execution = preset.execution
    if execution.gpu is None:
        return 0
    available = USABLE * GPUS[execution.gpu].memory
    gpus = 1
    while (needed := sweep_memory(preset, sweep, gpus).total) > available:
        if 2 * gpus > execution.max_gpus:
            raise UserError(
                f"sweep {sweep.condition.label} needs {needed / GB:.0f} GB on each of {gpus} x {execution.gpu}, which has "
                f"{available / GB:.0f} GB to give; lower execution.max_batch_tokens ({execution.max_batch_tokens}), "
                f"raise execution.max_gpus ({execution.max_gpus}), or choose another execution.gpu"
            )
        gpus *= 2
    return gpus


def _micro_batch(preset: Preset, condition: Condition) -> tuple[int, int]:
    """Tokens, padding included, and scored tokens of the largest micro-batch; all may be scored."""
    longest = cost.longest_sequence(preset, condition)
    # A batch is split at least in two.
    tokens = max(longest, min(preset.execution.max_batch_tokens, -(-condition.batch_size // 2) * longest))
    return tokens, tokens


def _activation_bytes(sizes: Dimensions, condition: Condition, bf16: bool) -> float:
    """What a layer keeps of each token for the backward pass."""
    d, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    mlp = sizes.intermediate * max(1, sizes.active_experts)
    if not bf16:
        return 4 * (6 * d + 3 * queries + 2 * keys + 4 * mlp)
    return 26 * d + 6 * queries + 4 * keys + 8 * mlp


def _cache(preset: Preset, sweep: Sweep, sizes: Dimensions, lanes: int, bf16: bool) -> float:
    rollouts = sweep.condition.rollouts
    if rollouts is None:
        return 0.0
    wanted = lanes * sweep.condition.batch_size * cost.longest_sequence(preset, sweep.condition)
    tokens = min(preset.execution.max_cache_tokens, wanted)
    # Keys come out of their rotation in fp32, values in the type of their product.
    return tokens * sizes.layers * sizes.kv_heads * sizes.head_dim * (6 if bf16 else 8)
