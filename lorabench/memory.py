"""Memory of a job, estimated from the sizes of its model: what decides how many GPUs it needs. No torch.

Per process: fp32 master weights, and in bf16 those that LoRA goes with; gradients and Adam's two moments of what is
trained; the bf16 copies of other weights that autocast makes; activations of one micro-batch; logits of its scored
tokens; in RL the cache of keys and values. Lanes of LoRA share the base, those of full fine-tuning no weights; the
tokens of all together are as many as those of one run. Over several GPUs (FSDP) weights, gradients and moments are
split, activations and logits are not. The numbers of bytes follow the code of transformers and PEFT, and were checked
by the life of every tensor's storage (`lorabench.training.compute`, tests/test_cost.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorabench.config import Preset
from lorabench.errors import UserError
from lorabench.gpus import GB, GPUS
from lorabench.lengths import longest_sequence
from lorabench.models.blocks import kept_shares
from lorabench.models.dimensions import Dimensions, dimensions, merges
from lorabench.models.placement import Placement

if TYPE_CHECKING:
    from lorabench.plan import Sweep

# Of a GPU's memory; the rest is the driver's, or lost between blocks.
USABLE = 0.92
# Of a process on a CPU that has imported its libraries, and in RL the graders' too: measured on the laptop preset.
_SFT_PROCESS, _RL_PROCESS = 0.54 * GB, 0.85 * GB
# Linear layers with LoRA in a decoder layer of experts, of placement all.
_LORA_LAYERS = 7


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU (or in the process, on a CPU)."""

    weights: float
    """Those in fp32, and in bf16 those that stay."""
    gradients: float
    moments: float
    copies: float
    """Weights in bf16 that live until the backward pass; with experts, their weights with LoRA added."""
    activations: float
    logits: float
    sampling: float
    """Keys, values and distributions while responses are drawn, and gradients that stay; not at the same time as
    gradients, copies, activations and logits."""

    @property
    def total(self) -> float:
        """The peak: of a training step, or of sampling. The gradients of a part of the batch wait for the next."""
        held = self.weights + self.moments
        return held + max(self.sampling, self.gradients + self.copies + self.activations + self.logits)


def trained_parameters(preset: Preset, sizes: Dimensions, rank: int | None, placement: Placement | None) -> int:
    """Parameters that an arm trains; rank None is full fine-tuning."""
    if rank is None or placement is None:
        return sizes.parameters
    return sizes.lora(placement, rank, preset.protocol.include_unembedding)[0]


def cast_parameters(preset: Preset, sizes: Dimensions, placement: Placement | None, gpus: int) -> int:
    """Parameters of frozen weights that stay in bf16 beside fp32: those that LoRA goes with, for speed.

    Not of sharded models, nor with `activation_checkpointing`, which is set where memory counts for more.
    """
    execution, bf16 = preset.execution, preset.protocol.precision == "bf16"
    if placement is None or not bf16 or execution.activation_checkpointing or _parts(preset, gpus) > 1:
        return 0
    return sizes.carrying(placement, preset.protocol.include_unembedding)


def sweep_memory(preset: Preset, sweep: Sweep, gpus: int = 1, lanes: int = 1) -> Memory:
    """Peak memory of a sweep's job, on each of its GPUs, with so many runs at once (see `lorabench.lanes`)."""
    condition, execution = sweep.condition, preset.execution
    sizes = dimensions(preset.models[condition.model])
    longest = longest_sequence(preset, condition)
    # A batch may go through the model at once, and all of its tokens may be scored.
    part = max(longest, min(execution.max_batch_tokens // lanes, condition.batch_size * longest))
    is_rl = condition.rollouts is not None
    # In RL attention has a mask, and is not computed in blocks.
    row = 0 if is_rl else longest
    step = step_memory(preset, sizes, condition.rank, condition.placement, lanes * part, row, gpus, is_rl, lanes)
    if not is_rl:
        return step
    bf16, sharded = preset.protocol.precision == "bf16", _parts(preset, gpus) > 1
    # Each process of a sharded model samples from a whole copy, whose linear layers are in the type of their products.
    copy = 4 * sizes.parameters - (2 * _linear(sizes) if bf16 else 0) if sharded else 0
    cached = max(longest, min(execution.max_cache_tokens, lanes * condition.batch_size * longest / gpus))
    # The gradients of LoRA's lanes have their place for good.
    staying = step.gradients if condition.rank is not None and not sharded else 0
    drawing = staying + _sampling(sizes, cached, cached / longest, bf16)
    return replace(step, weights=step.weights + copy, sampling=drawing)


def step_memory(
    preset: Preset,
    sizes: Dimensions,
    rank: int | None,
    placement: Placement | None,
    tokens: int,
    row: int,
    gpus: int = 1,
    is_rl: bool = False,
    lanes: int = 1,
) -> Memory:
    """Memory of a training step of an arm on micro-batches of so many tokens, all scored.

    Args:
        rank: of LoRA, None for full fine-tuning.
        tokens: of all lanes together.
        row: tokens of a row, that attention reaches over without a mask.
        is_rl: whether the loss is that of RL, which also measures the entropy.
    """
    bf16, again = preset.protocol.precision == "bf16", preset.execution.activation_checkpointing
    parts = _parts(preset, gpus)
    trained = lanes * trained_parameters(preset, sizes, rank, placement)
    layer = _layer_bytes(sizes, rank, bf16)
    if preset.execution.gpu is None:
        layer += sizes.heads * kept_shares(row, bf16) * (2 if bf16 else 4)
    # With checkpoints a layer keeps its input; what it needs in between is there for one layer at a time, when the
    # logits are gone.
    kept = sizes.layers * (4 * sizes.hidden if again else layer)
    # Logits and their gradient, in fp32; of RL also the entropy's.
    logits = sizes.vocabulary * (16 if is_rl else 12)
    # Sharded layers come together one by one; the next is fetched while one is computed.
    gathered = 2 * 4 * sizes.layer_parameters if parts > 1 else 0
    cast = cast_parameters(preset, sizes, placement, gpus)
    # Autocast keeps a copy of what is trained until the end of the pass, and any other layer one for its backward
    # pass; with checkpoints, where nothing large is trained or sharding turns the former off, one layer's at a time.
    share = 1 / sizes.layers if again and (rank is not None or parts > 1) else 1.0
    copies = 2.0 * ((1 if rank else lanes) * _linear(sizes) - cast) if bf16 else 0.0
    if rank is not None and placement != "attn":
        # PEFT adds LoRA to the weights of fused experts, in fp32.
        copies += 4 * sum(matrix.parameters for matrix in sizes.matrices if matrix.part == "experts")
    return Memory(
        weights=4 * (sizes.parameters + trained if rank else trained) / parts + 2 * cast + gathered,
        gradients=4 * trained / parts,
        moments=8 * trained / parts,
        copies=copies * share,
        # Beside the layers: embeddings, the last norm, what goes into the unembedding.
        activations=tokens * (kept + 10 * sizes.hidden),
        logits=tokens * (max(logits, layer) if again else logits),
        sampling=0,
    )


def peak_bytes(preset: Preset, sweep: Sweep, gpus: int, lanes: int) -> float:
    """The peak as runs report it: of tensors on each of so many GPUs, or with none of the whole process."""
    process = 0.0 if gpus else _SFT_PROCESS if sweep.condition.rollouts is None else _RL_PROCESS
    return process + sweep_memory(preset, sweep, max(1, gpus), lanes).total


def gpus_needed(preset: Preset, sweep: Sweep) -> int:
    """The smallest power of two of GPUs that holds a sweep's job with one run at a time; 0 on a CPU.

    Lanes are as many as it then has room for (see `lorabench.lanes`); more GPUs would be idle without them.

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
            again = "" if execution.activation_checkpointing else "set activation_checkpointing, "
            raise UserError(
                f"sweep {sweep.condition.label} needs {needed / GB:.0f} GB on each of {gpus} x {execution.gpu}, which "
                f"has {available / GB:.0f} GB to give; of execution, {again}lower max_batch_tokens "
                f"({execution.max_batch_tokens}) or max_cache_tokens ({execution.max_cache_tokens}), raise max_gpus "
                f"({execution.max_gpus}), or choose another gpu"
            )
        gpus *= 2
    return gpus


def _linear(sizes: Dimensions) -> int:
    """Parameters of all linear layers."""
    return sum(matrix.parameters for matrix in sizes.matrices)


def _parts(preset: Preset, gpus: int) -> int:
    """Parts that weights and what belongs to them are split into."""
    return gpus if preset.execution.sharding == "fsdp" else 1


def _layer_bytes(sizes: Dimensions, rank: int | None, bf16: bool) -> float:
    """What a layer keeps of each token for the backward pass."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    full = rank is None
    if bf16:
        kept = (26 if full else 18) * sizes.hidden + (4 if full else 6) * queries + 4 * keys
    else:
        kept = (24 if full else 16) * sizes.hidden + 8 * queries + 8 * keys
    if sizes.query_key_norms:
        kept += (4 if not full else 6 if bf16 else 8) * (queries + keys)
    if sizes.experts:
        # Experts compute in fp32, each on a copy of its tokens.
        kept += sizes.active_experts * (8 * sizes.hidden + 16 * sizes.intermediate)
    else:
        kept += (8 if bf16 else 16) * sizes.intermediate
    return kept + _lora_numbers(sizes, rank or 0, bf16) * (2 if bf16 else 4)


def _lora_numbers(sizes: Dimensions, rank: int, bf16: bool) -> int:
    """What A makes of each token in a layer, kept unless A and B are merged into the weights."""
    if sizes.experts:
        return _LORA_LAYERS * rank
    layers = sum(
        matrix.count
        for matrix in sizes.matrices
        if matrix.part != "unembedding" and (bf16 or not merges(rank, matrix.d_in, matrix.d_out))
    )
    return rank * layers // sizes.layers


def _sampling(sizes: Dimensions, tokens: float, rows: float, bf16: bool) -> float:
    """Of so many tokens in the cache, in so many rows."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # Keys come out of their rotation in fp32, values in the type of their product; a layer's buffers grow by copying.
    cache = tokens * (sizes.layers + 1) * keys * (6 if bf16 else 8)
    # One layer's keys and values, repeated for all heads, then cast.
    repeated = tokens * queries * (10 if bf16 else 8)
    # Log-probabilities, and their cumulated exponentials in double precision.
    return cache + repeated + rows * sizes.vocabulary * 34
