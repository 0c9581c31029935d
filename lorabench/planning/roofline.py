"""The seconds of a training step on a GPU, kernel by kernel: those of its FLOPs or of its bytes, whichever are more.

Products and attention compute at a share of the GPU's peak, and all kernels read and write at a share of its bandwidth
(`lorabench.utils.gpus`). The bytes of elementwise kernels were counted on tensors without content, for each kernel of
the project's own gradient; they are sums over the sizes of a layer, and tests/planning/test_roofline.py counts them
again. The module imports no torch, so that a job plans within a second, and all jobs plan alike.
"""

from __future__ import annotations

from typing import NamedTuple

from lorabench.config.fields import Placement
from lorabench.config.preset import Preset
from lorabench.models.specs import Dimensions, Matrix, dimensions
from lorabench.planning.flops import SHARED_ROW, is_fused, lora_parameters, share_rows
from lorabench.runs import Condition
from lorabench.utils.gpus import GPUS, Gpu

# The share of products' FLOP/s that attention reaches, an assumption: FlashAttention-2 has about half on an H100, and
# FlashAttention-4, by the size of a head, what FlashAttention-3 has there (arXiv:2407.08608, figures 5 and 6: forward
# and backward, 4,096 tokens that all see each other). With a mask, as in rows that responses of RL share, PyTorch has a
# kernel that takes twice the time of FlashAttention-2 (xformers#1074). The backward pass takes 2.5 times the FLOPs,
# since it computes the scores again.
_ATTENTION, _FLASH_ATTENTION_4, _MASKED, _ATTENTION_BACKWARD = 0.5, {64: 0.68, 128: 0.83}, 0.25, 2.5
# Bytes that elementwise kernels read and write for each token in a layer: per hidden number, query and key, query and
# key that are normed besides, number within the MLP, and rank in an adapted linear layer. Forward, and in training
# with LoRA and in full fine-tuning both passes; by whether the kernels are fused.
_BYTES = {
    True: {"forward": (28, 4, 0, 6, 4), "lora": (82, 8, 2, 16, 8), "fullft": (94, 8, 6, 16, 0)},
    False: {"forward": (106, 36, 48, 10, 4), "lora": (360, 94, 151, 28, 8), "fullft": (392, 94, 165, 28, 0)},
}
# Outside of the layers, forward and in training: for each token per hidden number (embedding and last norm), and for
# each scored token per logit and per hidden number. The gradient of an embedding takes more for each token.
_OUTSIDE = {True: ((48, 2, 10), (77, 6, 73)), False: ((48, 18, 10), (77, 44, 73))}
_EMBEDDING = 46
# In full fine-tuning a pass casts each weight and adds up its gradient, but for the first pass of a step, which keeps
# it. An optimizer step reads and writes weights, gradients and both moments, after two passes to clip the gradient.
_PASS, _LESS_IN_FIRST, _STEP = 24, 12, 40
# Time of the products in a mixture of experts over that in bf16: experts compute in TF32; and of LoRA on the experts,
# which is added to their weights in each pass, and takes the gradient of their whole weights.
_EXPERTS, _LORA_ON_EXPERTS = 1.6, 2.4


class Parts(NamedTuple):
    """Seconds by the kernels that take them."""

    products: float = 0.0
    elementwise: float = 0.0
    attention: float = 0.0

    def plus(self, other: Parts, times: float = 1.0) -> Parts:
        """Return the sum with a multiple of others."""
        return Parts(*(mine + times * more for mine, more in zip(self, other, strict=True)))


class Pass(NamedTuple):
    """Seconds of a pass on one GPU for each token, and besides for each whose logits are computed."""

    token: Parts
    scored: Parts


class StepSeconds(NamedTuple):
    """The seconds on one GPU of training, with recomputed layers, and of evaluation; and of a pass and a step."""

    trained: Pass
    evaluated: Pass
    each_pass: float
    each_step: float


def step_seconds(preset: Preset, condition: Condition, tokens: float, learned: float, context: float) -> StepSeconds:
    """Return the seconds of a condition's training on the preset's GPU, where recomputed layers are decided.

    `tokens` go through the model at once, and attend to so many tokens: in training `learned`, in evaluation `context`.
    """
    sizes = dimensions(preset.models[condition.model])
    masked = condition.rollouts is not None and learned <= SHARED_ROW and not share_rows(preset, sizes)
    return arm_seconds(preset, sizes, condition.rank, condition.placement, tokens, learned, context, masked)


def arm_seconds(
    preset: Preset,
    sizes: Dimensions,
    rank: int | None,
    placement: Placement | None,
    tokens: float,
    learned: float,
    context: float,
    masked: bool = False,
) -> StepSeconds:
    """Return what `step_seconds` does for sizes and an arm; without a rank it is full fine-tuning.

    In training attention may be computed with a mask that is not plainly causal.
    """
    assert preset.execution.gpu
    gpu, arm = GPUS[preset.execution.gpu], (rank, placement)
    newer = gpu.flash_attention_4 and is_fused(preset, sizes) and _FLASH_ATTENTION_4.get(sizes.head_dim)
    # As many tokens would take as long if attention reached all FLOP/s of products.
    learned, context = learned / (_MASKED if masked else newer or _ATTENTION), context / (newer or _ATTENTION)
    again = preset.execution.recomputed_layers(sizes.layers) / sizes.layers
    trained = _pass(preset, gpu, sizes, arm, tokens, learned, backward=True)
    # Activation checkpointing recomputes layers, and not the unembedding.
    recomputed = trained.token.plus(_layers(preset, gpu, sizes, arm, tokens, learned, backward=False), again)
    evaluated = _pass(preset, gpu, sizes, arm, tokens, context, backward=False)
    parameters = sizes.parameters if rank is None else lora_parameters(preset, sizes, rank, placement)[0]
    of_weights = sizes.parameters if rank is None else 0
    each_step = _STEP * parameters - _LESS_IN_FIRST * of_weights
    return StepSeconds(
        Pass(recomputed, trained.scored), evaluated, _PASS * of_weights / gpu.streaming, each_step / gpu.streaming
    )


Arm = tuple[int | None, Placement | None]


def _pass(preset: Preset, gpu: Gpu, sizes: Dimensions, arm: Arm, tokens: float, context: float, backward: bool) -> Pass:
    per_token, per_logit, per_scored = _OUTSIDE[is_fused(preset, sizes)][backward]
    layers = _layers(preset, gpu, sizes, arm, tokens, context, backward)
    *_, unembedding = sizes.matrices
    products = _product(preset, gpu, sizes, unembedding, arm, tokens, backward)
    per_token += _EMBEDDING * (backward and arm[0] is None)
    elementwise = per_logit * sizes.vocabulary + per_scored * sizes.hidden
    return Pass(
        layers.plus(Parts(elementwise=per_token * sizes.hidden / gpu.streaming)),
        Parts(products, elementwise / gpu.streaming),
    )


def _layers(
    preset: Preset, gpu: Gpu, sizes: Dimensions, arm: Arm, tokens: float, context: float, backward: bool
) -> Parts:
    """Return the seconds of all layers for a token."""
    rank, placement = arm
    *matrices, _ = sizes.matrices
    products = sum(m.active * _product(preset, gpu, sizes, m, arm, tokens, backward) for m in matrices)
    if sizes.experts:
        products *= _EXPERTS if placement in (None, "attn") else _LORA_ON_EXPERTS
    kind = "forward" if not backward else "fullft" if rank is None else "lora"
    hidden, heads, normed, inner, per_rank = _BYTES[is_fused(preset, sizes)][kind]
    queries_and_keys = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    # Experts compute in fp32.
    wide = 2 * sizes.active_experts * sizes.intermediate if sizes.experts else sizes.intermediate
    adapted = sum(m.active for m in sizes.adapted(placement, include_unembedding=False)) if placement else 0
    size = sizes.layers * (
        hidden * sizes.hidden + (heads + normed * sizes.query_key_norms) * queries_and_keys + inner * wide
    )
    flops = 4.0 * context * sizes.heads * sizes.head_dim
    # Queries, keys, values and results, and backward their gradients too.
    attention = _kernel(gpu, flops, 4.0 * queries_and_keys)
    attention += backward * _kernel(gpu, _ATTENTION_BACKWARD * flops, 8.0 * queries_and_keys)
    return Parts(products, (size + per_rank * (rank or 0) * adapted) / gpu.streaming, sizes.layers * attention)


def _product(
    preset: Preset, gpu: Gpu, sizes: Dimensions, matrix: Matrix, arm: Arm, tokens: float, backward: bool
) -> float:
    """Return the seconds of the products of a linear layer for a token, each in bf16 or the precision's type."""
    (rank, placement), d_in, d_out = arm, matrix.d_in, matrix.d_out
    number = 2.0 if preset.protocol.precision == "bf16" else 4.0
    whole = _kernel(gpu, 2.0 * d_in * d_out, number * (d_in + d_out + d_in * d_out / tokens))
    passes = 1 if not backward else 3 if rank is None else 2
    if rank is None or placement is None:
        return passes * whole
    if matrix not in sizes.adapted(placement, preset.protocol.include_unembedding):
        return passes * whole
    if matrix.part == "experts":
        rank = max(1, rank // sizes.active_experts)
    # From or to the few columns of A or B, and added to a result, which is read and written.
    (narrow_in, added_in), (narrow_out, added_out) = (
        [_kernel(gpu, 2.0 * rank * width, number * (times * width + rank)) for times in (1, 2)]
        for width in (d_in, d_out)
    )
    seconds = passes * whole + narrow_in + added_out
    return seconds + backward * (2 * narrow_out + added_in + narrow_in)


def _kernel(gpu: Gpu, flops: float, size: float) -> float:
    return max(flops / gpu.products, size / gpu.streaming)
