"""The memory of a job, estimated from the sizes of its model; it decides the number of GPUs. Does not import torch.

A process holds its weights in fp32, of which frozen ones that were published in bf16 are in bf16 alone, and others that
carry LoRA have a bf16 copy; gradients and Adam's two moments of the trained parameters; the bf16 copies that autocast
makes of the other weights, but for those of experts, which compute in fp32; activations of one micro-batch; a piece of
the logits of its scored tokens; in RL the cache of keys and values, or the engine vLLM. Over several GPUs (FSDP)
weights, gradients and moments are split. Activations and logits are not, nor are the copies, which autograd keeps for
the backward pass when the gathered weights are given back. The numbers of bytes follow the code of transformers and
PEFT, and were checked by the lifetime of every tensor's storage, also in two processes that share a model
(`lorabench.training.step_cost`, tests/planning/test_memory.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

from lorabench.config.fields import CHANGES_BASE, FROM_WEIGHTS, METHOD_NAMES, Method, Placement
from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.models.specs import Dimensions, dimensions, kept_shares, merging_is_cheaper
from lorabench.models.vllm_support import max_lora_rank
from lorabench.planning.flops import is_fused, longest_sequence, lora_parameters, row_limit, run_work
from lorabench.runs import Condition, Sweep
from lorabench.utils.gpus import GB, GPUS

# The usable share of a GPU's memory; the driver and the gaps between allocated blocks take up the remainder.
USABLE = 0.92
# Linear layers that carry LoRA in a decoder layer with experts, where all layers do.
_LORA_LAYERS = 7
# Gradients in a layer's backward pass as a share of what the layer keeps: measured in fp32 and bf16 on the tiny bases.
_IN_BACKWARD = 0.3
# Bytes of an engine on a GPU besides those that follow from sizes (CUDA context, libraries, graphs): an assumption
# until it is measured. Bytes of its process on a CPU, measured on the tiny bases: 0.92 GB.
_ENGINE_ON_GPU, _ENGINE_ON_CPU = 2.5 * GB, 1.0 * GB
# Bytes of each logit while the engine draws a token: in the type of products and in fp32, with its log-probability,
# probability and random number. So it is in the code of vLLM 0.32.
_LOGIT = 18
LOGITS_AT_ONCE = {"cpu": 1 << 24, "gpu": 1 << 26}
"""The most logits that are computed at once: `MAX_LOGITS` of training/loss.py, which imports torch."""


class EngineBatch(NamedTuple):
    """The most that goes through an engine's model at once; the defaults are those of vLLM itself on a CPU.

    In vLLM they are `max_num_seqs` and `max_num_batched_tokens`, the tokens of prompts included.
    """

    responses: int = 256
    tokens: int = 4096


def uses_engine(preset: Preset, condition: Condition) -> bool:
    """Return whether the responses of a condition's runs are drawn by vLLM, an engine of which each process starts."""
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


def engine_memory(preset: Preset, model: str, condition: Condition | None = None) -> tuple[float, float]:
    """Return the bytes of each engine of a job that trains a condition, or of an evaluation with lm-eval.

    They are held throughout the job. The first number is of all, weights and adapters in the type of products included;
    the second of keys and values, of `execution.max_cache_tokens` tokens or of the longest response if that is more.
    UserError says that vLLM does not take adapters of the condition's rank.
    """
    sizes, number = dimensions(preset.models[model]), number_bytes(preset)
    weights, cached, overhead = sizes.parameters, preset.execution.max_cache_tokens, _ENGINE_ON_CPU
    if condition is not None:
        cached = max(cached, longest_sequence(preset, condition))
        room = None if condition.rank is None else max_lora_rank(condition.rank)
        weights = _engine_weights(sizes, condition) + lora_parameters(preset, sizes, room, condition.placement)[0]
    if preset.execution.gpu is not None:
        # A layer's widest activations live together: those of gate, up and their product, beside the hidden ones.
        batch, wide = engine_batch(preset, condition), sizes.intermediate * max(1, sizes.active_experts)
        activations = 3 * number * batch.tokens * (sizes.hidden + wide)
        overhead = _ENGINE_ON_GPU + activations + _LOGIT * batch.responses * sizes.vocabulary
    cache = cached * cache_bytes(preset, sizes)
    return number * weights + cache + overhead, cache


def _engine_weights(sizes: Dimensions, condition: Condition) -> int:
    """Return the number of weights that an engine holds: a tied unembedding that is trained is a weight of its own."""
    return sizes.parameters + sizes.tied * (condition.method == "fullft") * sizes.vocabulary * sizes.hidden


def number_bytes(preset: Preset) -> int:
    """Return the bytes of a weight, key or value of the engine."""
    return 2 if preset.protocol.precision == "bf16" else 4


def cache_bytes(preset: Preset, sizes: Dimensions) -> int:
    """Return the bytes of a token's keys and values in all layers of the engine."""
    return number_bytes(preset) * sizes.layers * 2 * sizes.kv_heads * sizes.head_dim


def handover_bytes(preset: Preset, condition: Condition) -> int:
    """Return the bytes of the files in which a job hands its weights to all of its engines in each step.

    They are the whole model in the type of its products in full fine-tuning, and in LoRA the adapter in fp32.
    """
    sizes = dimensions(preset.models[condition.model])
    if condition.rank is None:
        return number_bytes(preset) * _engine_weights(sizes, condition)
    return 4 * lora_parameters(preset, sizes, condition.rank, condition.placement)[0]


def bf16_parameters(
    preset: Preset, sizes: Dimensions, placement: Placement | None, gpus: int, method: Method = "lora"
) -> tuple[int, int]:
    """Return the number of frozen parameters that are held in bf16 alone, and of those that have a bf16 copy for speed.

    Where activations are recomputed, memory matters more than speed, and copies are kept in passes without gradients
    only.
    """
    if placement is None or preset.protocol.precision != "bf16" or gpus > 1:
        return 0, 0
    head = preset.protocol.include_unembedding
    # What PiSSA and OLoRA leave of a weight, and one of QLoRA in 4 bits, is not exact in bf16.
    if not sizes.in_bf16 or method in CHANGES_BASE:
        return 0, sum(matrix.parameters for matrix in sizes.adapted(placement, head) if matrix.part != "experts")
    # As in `lorabench.models.lora.hold_in_bf16`.
    parts = {"attn", "mlp"} | (set() if sizes.tied else {"unembedding"})
    held = sum(matrix.parameters for matrix in sizes.matrices if matrix.part in parts)
    return held, sizes.vocabulary * sizes.hidden if sizes.tied and head else 0


def sweep_memory(preset: Preset, sweep: Sweep, gpus: int = 1) -> float:
    """Estimate the most bytes that a sweep's job needs at a time on each of its GPUs, or on a CPU in its process."""
    preset = decided(preset, sweep, gpus)
    condition, execution, bf16 = sweep.condition, preset.execution, preset.protocol.precision == "bf16"
    sizes = dimensions(preset.models[condition.model])
    longest, is_rl = longest_sequence(preset, condition), condition.rollouts is not None
    # The upper limit: a batch may go through the model at once, and all of its tokens may be scored.
    tokens = max(longest, min(execution.max_batch_tokens, condition.batch_size * longest))
    row, method = row_limit(longest, execution.max_batch_tokens) if is_rl else longest, condition.method
    held, step = step_memory(preset, sizes, condition.rank, condition.placement, tokens, row, gpus, is_rl, method)
    if uses_engine(preset, condition):
        # The engine draws responses next to the trainer and holds its memory throughout.
        return held + step + engine_memory(preset, condition.model, condition)[0]
    # Where training does not keep the bf16 copies of weights that carry LoRA, passes without gradients do.
    again = execution.recomputed_layers(sizes.layers) > 0
    cast = 2 * bf16_parameters(preset, sizes, condition.placement, gpus, method)[1] if again else 0
    if not is_rl:
        return held + max(step, cast)
    # Each process of a sharded model samples from a whole copy, with linear layers in the precision of their products.
    linear = sum(matrix.parameters for matrix in sizes.matrices)
    copy = 4 * sizes.parameters - (2 * linear if bf16 else 0) if gpus > 1 else 0
    cached = max(longest, min(execution.max_cache_tokens, condition.batch_size * longest / gpus))
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # Keys and values have the precision of their products; a layer's buffers grow by copying. One layer's keys and
    # values are repeated for all heads.
    cache = cached * (4 if bf16 else 8) * ((sizes.layers + 1) * keys + queries)
    # Log-probabilities of each row, and the cumulative sums of their exponentials in double precision. Responses are
    # never drawn at the same time as a step is computed.
    return held + copy + max(step, cast + cache + cached / longest * sizes.vocabulary * 34)


def step_memory(
    preset: Preset,
    sizes: Dimensions,
    rank: int | None,
    placement: Placement | None,
    tokens: int,
    row: int,
    gpus: int = 1,
    is_rl: bool = False,
    method: Method = "lora",
) -> tuple[float, float]:
    """Estimate the bytes on each GPU of a training step on micro-batches whose tokens are all scored, without sampling.

    The first number is what is held throughout: weights with the copies that are kept from step to step, and Adam's
    moments. The second is what a step takes besides: gradients, which wait for the batch's next part; copies of weights
    in bf16, or with LoRA added; activations; and the logits, or the backward pass through a layer if that takes more.
    Whether activations are recomputed must be decided (see `decided`). Without a rank it is full fine-tuning. `tokens`
    are those of a micro-batch, and `row` those of a row, in RL the most in a row with several responses.
    """
    bf16, recomputed = preset.protocol.precision == "bf16", preset.execution.recomputed_layers(sizes.layers)
    on_cpu = preset.execution.gpu is None
    trained = sizes.parameters if rank is None else lora_parameters(preset, sizes, rank, placement)[0]
    layer, extra = _layer_bytes(sizes, rank, bf16, gpus, is_fused(preset, sizes)), 0
    if method == "dora":
        # Magnitudes; the outputs that they scale; and the largest weight with LoRA added, for its norms.
        adapted = sizes.adapted(placement or "all", preset.protocol.include_unembedding)
        trained += sum(matrix.count * matrix.d_out for matrix in adapted)
        outputs = sum(matrix.count * matrix.d_out for matrix in adapted if matrix.part != "unembedding")
        layer += outputs // sizes.layers * (2 if bf16 else 4)
        extra = 8 * max(matrix.d_in * matrix.d_out for matrix in adapted)
    elif method in FROM_WEIGHTS:
        # The initial factors, and an unembedding of its own where the base's is tied.
        extra = 4 * (trained + sizes.tied * preset.protocol.include_unembedding * sizes.vocabulary * sizes.hidden)
    if on_cpu and not is_rl:
        layer += sizes.heads * kept_shares(row, bf16) * (2 if bf16 else 4)
    # The first layers may keep only their inputs; their other activations exist for one layer at a time.
    keeping = sizes.layers - recomputed
    kept = recomputed * 4 * sizes.hidden + keeping * layer
    # Logits and their gradient in fp32; in RL also what the entropy takes.
    logit = (16 if is_rl else 12) + (4 if method == "dora" and preset.protocol.include_unembedding else 0)
    logits = tokens * sizes.vocabulary * logit
    at_once = LOGITS_AT_ONCE["cpu" if on_cpu else "gpu"]
    if tokens * sizes.vocabulary > at_once:
        # Pieces of the logits one after the other, and the gradient of the unembedding's input.
        logits = logit * max(at_once, sizes.vocabulary) + 4 * tokens * sizes.hidden
    # When the logits are freed, a layer's backward pass needs its activations, kept or recomputed, and their gradients.
    # The first layers are recomputed when the last have freed what they kept.
    backward, gathered = tokens * layer * (_IN_BACKWARD + (0 if keeping else 1)), 0
    if gpus > 1:
        # Layers are gathered one by one, the next while one is computed; embedding and unembedding stay gathered.
        gathered = 4 * (sizes.parameters + (2 - sizes.layers) * sizes.layer_parameters)
        # The gradient of a whole layer, and a copy of it from which each process gets its part. The gradient of a tied
        # embedding waits for the end of the pass; that of another unembedding takes the place of the embedding, which
        # is not gathered then.
        backward += 0 if rank else 4 * (2 * sizes.layer_parameters + sizes.tied * sizes.vocabulary * sizes.hidden)
    held, copied = bf16_parameters(preset, sizes, placement, gpus, method)
    cast = 0 if recomputed else copied
    # Autocast keeps a copy of each trained weight until the end of the pass, and every other layer a copy for its
    # backward pass. Of recomputed layers there is one layer's copy at a time, unless an unsharded model is fully
    # fine-tuned.
    share = max(1, keeping) / sizes.layers if rank is not None or gpus > 1 else 1.0
    experts = sum(matrix.parameters for matrix in sizes.matrices if matrix.part == "experts")
    linear = sum(matrix.parameters for matrix in sizes.matrices)
    copies = 2.0 * (linear - experts - held - cast) if bf16 else 0.0
    if rank is not None and placement != "attn":
        # PEFT adds LoRA to the weights of fused experts, in fp32.
        copies += 4 * experts
    weights = 4 * (sizes.parameters + trained if rank else trained) / gpus - 2 * held + 2 * cast + gathered + extra
    # Besides the layers: the embeddings, the last norm, the unembedding's input, and in RL the mask of attention.
    activations = tokens * (kept + 10 * sizes.hidden + (row * (2 if bf16 else 4) if is_rl else 0))
    gradients, moments = 4 * trained / gpus, 8 * trained / gpus
    return weights + moments, gradients + copies * share + activations + max(logits, backward)


def title(condition: Condition) -> str:
    """Return the method, model and data of a condition in words."""
    name = METHOD_NAMES[condition.method]
    method = "full fine-tuning" if condition.rank is None else f"{name} r{condition.rank} {condition.placement}"
    return f"{method} of {condition.model} on {condition.dataset}"


def gpus_needed(preset: Preset, sweep: Sweep) -> int:
    """Return the smallest number of GPUs, a power of two, that holds a sweep's job; 0 on a CPU.

    UserError says that the job does not even fit on `execution.max_gpus`.
    """
    preset, condition = decided(preset, sweep), sweep.condition
    execution = preset.execution
    if execution.gpu is None:
        return 0
    if (gpus := _least_gpus(preset, sweep)) is not None:
        return gpus
    most, available = 2 ** int(math.log2(most_gpus(preset, condition))), USABLE * GPUS[execution.gpu].memory
    also = "" if execution.activation_checkpointing else "set activation_checkpointing, "
    more = f"raise max_gpus ({execution.max_gpus})"
    if most_gpus(preset, condition) < execution.max_gpus:
        more = "train LoRA or all weights, which several GPUs can share"
    raise UserError(
        f"{title(condition)} needs {sweep_memory(preset, sweep, most) / GB:.0f} GB on each of "
        f"{most} x {execution.gpu}, which has {available / GB:.0f} GB to give; of execution, {also}lower "
        f"max_batch_tokens ({execution.max_batch_tokens}) or max_cache_tokens ({execution.max_cache_tokens}), "
        f"{more}, or choose another gpu"
    )


def most_gpus(preset: Preset, condition: Condition) -> int:
    """Return the most GPUs of a condition's jobs: 1 for variants of LoRA, which start from a layer's whole weights."""
    return preset.execution.max_gpus if condition.method in ("fullft", "lora") else 1


def _least_gpus(preset: Preset, sweep: Sweep) -> int | None:
    """Return the smallest number of GPUs that holds a sweep's job; None if no allowed number does."""
    numbers = (2**power for power in range(most_gpus(preset, sweep.condition).bit_length()))
    return next((gpus for gpus in numbers if fits(preset, sweep, gpus)), None)


def fits(preset: Preset, sweep: Sweep, gpus: int) -> bool:
    """Return whether some GPUs hold a sweep's job."""
    assert preset.execution.gpu
    return sweep_memory(preset, sweep, gpus) <= USABLE * GPUS[preset.execution.gpu].memory


def decided(preset: Preset, sweep: Sweep, gpus: int | None = None) -> Preset:
    """Return the preset with `activation_checkpointing: auto` decided for a sweep.

    It is the least number of layers with which the sweep's job fits some GPUs, by default the least number of them.
    """
    execution = preset.execution
    if execution.activation_checkpointing != "auto":
        return preset
    layers = dimensions(preset.models[sweep.condition.model]).layers
    choices = [preset.with_execution(activation_checkpointing=number) for number in range(layers + 1)]
    if execution.gpu is None:
        return choices[0]
    if gpus is None and (gpus := _least_gpus(choices[-1], sweep)) is None:
        return choices[-1]
    return choices[bisect_left(choices[:-1], True, key=lambda choice: fits(choice, sweep, gpus))]


def _layer_bytes(sizes: Dimensions, rank: int | None, bf16: bool, gpus: int, fused: bool) -> float:
    """Return the bytes that a layer keeps of each token for the backward pass."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # By whether the weights are frozen and whether products are in bf16: bytes of the hidden size, queries, keys, and
    # where they are normed, of both again.
    hidden, of_queries, of_keys, of_norms = {
        (False, False): (24, 8, 8, 8),
        (False, True): (26, 4, 4, 6),
        (True, False): (16, 8, 8, 4),
        (True, True): (18, 6, 4, 4),
    }[rank is not None, bf16]
    inner = 8 if bf16 else 16
    if fused:
        # Two residuals and what is made of them; queries, keys and values as attention takes them, its result, and what
        # is normed.
        number = 2 if bf16 else 4
        hidden, of_queries, of_keys, of_norms, inner = 8 + 2 * number, 2 * number, 2 * number, number, 3 * number
    kept = hidden * sizes.hidden + of_queries * queries + of_keys * keys
    kept += sizes.query_key_norms * of_norms * (queries + keys)
    if sizes.experts:
        # Experts compute in fp32, each on a copy of its tokens.
        kept += sizes.active_experts * (8 * sizes.hidden + 16 * sizes.intermediate)
    else:
        kept += inner * sizes.intermediate
    if rank is None:
        return kept
    # A's outputs are kept unless A and B are merged into the weights, which sharded models and bf16 do not do; with
    # experts all linear layers have them.
    layers = [matrix for matrix in sizes.matrices if matrix.part != "unembedding"]
    if not bf16 and gpus <= 1:
        layers = [matrix for matrix in layers if not merging_is_cheaper(rank, matrix.d_in, matrix.d_out)]
    carrying = _LORA_LAYERS * sizes.layers if sizes.experts else sum(matrix.count for matrix in layers)
    return kept + rank * carrying // sizes.layers * (2 if bf16 else 4)
