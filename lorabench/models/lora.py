"""LoRA through PEFT, in the paper's parametrization.

W' = W + (alpha/r) B A with A uniform in +-1/sqrt(d_in) (PEFT's default initialization), B zero, and the same LR for
both (the paper, "Setting LoRA hyperparameters"). The unembedding may carry LoRA too, as the paper's parameter counts
imply.

In a mixture of experts each expert has a LoRA of its own, whose rank is the total rank divided by the number of active
experts, at least 1 (the paper, "Layers where LoRA is applied"). The router has none. Where experts are fused in one
parameter (gate and up as one matrix, experts stacked), gate and up share an A.

PiSSA and OLoRA take a part of each weight out of the base and start the adapter with it. QLoRA rounds the base to 4
bits (NF4), but holds it as other weights; in fp32, bitsandbytes trains with the same results.

PEFT adds the adapter and saves it; `use_fast_products` replaces the forward pass of its linear layers, but of no fused
experts or sharded models. Where the rank is large for the layer, merging A and B into the weights takes fewer FLOPs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorabench.config.fields import FROM_WEIGHTS, ROUTERS, SUFFIXES, Method, Placement, placement_of
from lorabench.errors import UserError
from lorabench.models.specs import merging_is_cheaper

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_OPTIONS: dict[Method, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
"""What PEFT's LoraConfig is told of a variant beyond LoRA's own options."""


_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NF4 (Dettmers et al., 2023, appendix E), in units of the largest absolute value of 64 numbers."""


def in_expert(name: str) -> bool:
    """Return whether a module or parameter belongs to an expert, judging by its full name."""
    return "experts" in name.split(".")[:-1]


def targets(model: PreTrainedModel, placement: Placement, include_unembedding: bool) -> tuple[list[str], list[str]]:
    """Return the full names of the linear layers, and of the stacks of experts, that carry LoRA.

    UserError says that the model has no such layer under a known name, or that some would silently get no LoRA.
    """
    known, head = SUFFIXES[placement], model.get_output_embeddings()
    ends = tuple(f".{name}" for name in known)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    modules = [name for name in linear if name.endswith(ends)]
    parameters = model.named_parameters()
    stacks = [n for n, p in parameters if p.ndim == 3 and in_expert(n) and n.rpartition(".")[2] in known]
    if not modules and not stacks:
        names = ", ".join(known)
        raise UserError(f"{type(model).__name__} has no layer for placement {placement!r}; known names: {names}")
    others = [name for name in linear if name not in modules and name.rpartition(".")[2] not in ROUTERS]
    left_out = {name.rpartition(".")[2] for name in others if placement in ("all", placement_of(name))}
    if left_out:
        names = ", ".join(sorted(left_out))
        raise UserError(f"{type(model).__name__} has layers that placement {placement!r} does not know: {names}")
    if include_unembedding:
        modules += [name for name, module in model.named_modules() if module is head]
    return modules, stacks


def add_lora(
    model: PreTrainedModel,
    rank: int,
    placement: Placement,
    alpha: float,
    include_unembedding: bool,
    seed: int,
    init_a: float = 1.0,
    method: Method = "lora",
) -> PeftModel:
    """Put LoRA on a base model, which is then frozen; `.unload()` removes LoRA again.

    PiSSA, OLoRA and QLoRA change the base's weights, which `.unload()` leaves changed, and the former two give a tied
    unembedding weights of its own. A is drawn from the seed, within `init_a` in units of 1/sqrt(d_in). UserError says
    that the model has no such layers, or PEFT put LoRA on others.
    """
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm

    # PEFT's progress bars would start a thread, and when memory has run out such a start never returns.
    tqdm.monitor_interval = 0
    modules, stacks = targets(model, placement, include_unembedding)
    names = {*modules, *stacks}
    head: Any = model.get_output_embeddings()
    from_weights = method in FROM_WEIGHTS
    if method == "qlora":
        round_to_nf4(model)
    if from_weights and include_unembedding and head.weight is model.get_input_embeddings().weight:
        # The embedding would change with it.
        head.weight = nn.Parameter(head.weight.detach().clone())
    ranks = {}
    if any(map(in_expert, names)):
        # The pattern is that of layers inside a module named `experts`; shared experts, always active, do not match.
        ranks[r"experts\..+"] = max(1, rank // int(model.config.num_experts_per_tok))
    config = LoraConfig(
        r=rank,
        rank_pattern=ranks,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=stacks or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        **_OPTIONS.get(method, {}),
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT warns of tied embeddings, of which only the unembedding carries LoRA, and of what a user can't change.
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config)
    layers = dict(lora_layers(peft_model))
    # PEFT rewrites the targets of some mixtures of experts, to load adapters that older versions saved.
    if layers.keys() != names:
        raise UserError(
            f"PEFT did not put LoRA on the requested layers of {type(model).__name__}: see {min(layers.keys() ^ names)}"
        )
    with torch.no_grad():
        for layer in layers.values():
            factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
            factors[0].mul_(init_a)
            if from_weights:
                layer.initial_factors = [factor.detach().clone() for factor in factors]
    return peft_model


def round_to_nf4(model: PreTrainedModel) -> None:
    """Round the weights of all linear layers but the unembedding, which transformers does not quantize either."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            weight = module.weight.data
            blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
            scales = blocks.abs().amax(1, keepdim=True)
            levels = torch.tensor(_LEVELS, dtype=weight.dtype, device=weight.device)
            relative = blocks / scales.clamp(min=torch.finfo(weight.dtype).tiny)
            nearest = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
            module.weight.data = (levels[nearest] * scales).flatten()[: weight.numel()].view_as(weight)


def save_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Save a trained adapter for the base model as it was before training.

    PiSSA and OLoRA have W' = W + s (B A - B0 A0), where s is the scaling and B0 A0 what was taken out of the base. They
    are saved as LoRA of twice the rank, with the factors [B, -B0] and [A; A0], as PEFT converts them itself. The model
    is not used after this; `state` has the trained weights of one that is sharded.
    """
    doubled = {name: layer for name, layer in model.named_modules() if hasattr(layer, "initial_factors")}
    if doubled:
        state = {}
        for name, layer in doubled.items():
            for factor, initial, sign, dim in zip("AB", layer.initial_factors, (1, -1), (0, 1), strict=True):
                key = f"lora_{factor}.default.weight"
                state[f"{name}.{key}"] = torch.cat([layer.get_parameter(key).detach(), sign * initial], dim=dim)
        config: Any = model.peft_config["default"]
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    # PEFT would else add a copy of an adapted unembedding.
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's LoRA layers, each with the name in the base model of the module or parameter that it adapts."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # For two parameters of a module PEFT nests two wrappers.
            path = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
            yield ".".join(path + ([module.parameter_name] if isinstance(module, ParamWrapper) else [])), module


def adapter_pairs(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return by linear layer, without experts, the parameters A (r, d_in) and B (d_out, r) and the scaling alpha/r."""
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
        for name, layer in lora_layers(model)
        if not in_expert(name)
    }


def tie_beneath(model: PeftModel) -> None:
    """Name the wrapped weights of PEFT's layers to transformers, which ties weights again after sharding or moving."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()
    for name, source in list(base.all_tied_weights_keys.items()):
        layer, _, weight = name.rpartition(".")
        if isinstance(base.get_submodule(layer), BaseTunerLayer):
            del base.all_tied_weights_keys[name]
            base.all_tied_weights_keys[f"{layer}.base_layer.{weight}"] = source
    model.tie_weights = partial(base.tie_weights, recompute_mapping=False)


def hold_in_bf16(model: PreTrainedModel) -> None:
    """Store the weights of a base's linear layers in bf16 where that changes none, before it gets LoRA.

    Under autocast to bf16 all results are the same, bit for bit, since it would cast these weights itself. Those that
    bf16 would round, those of an embedding, and those of norms and experts, which compute in fp32, stay in fp32.
    `model.float()` undoes it.
    """
    embedding: Any = model.get_input_embeddings()
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or layer.weight is embedding.weight or layer.weight.dtype != torch.float32:
            continue
        rounded = layer.weight.detach().bfloat16()
        if torch.equal(rounded.float(), layer.weight):
            layer.weight.data = rounded
            # PEFT creates A and B in this type rather than in that of the weight, which would round A.
            layer.compute_dtype = torch.float32  # type: ignore[assignment]


def use_fast_products(model: nn.Module, keep_cast: bool = True) -> None:
    """Replace the forward pass of a model's LoRA layers; `model.unload()` returns the base as it was.

    With autocast, `keep_cast` keeps the cast frozen weights, which take half the memory of the base. Otherwise they are
    cast in every pass with gradients; passes without gradients keep them until the next with.
    """
    from peft.tuners.lora import Linear

    for _, layer in lora_layers(model):
        if isinstance(layer, Linear):
            layer.keep_cast, layer.cast = keep_cast, None
            layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Compute a linear layer with LoRA, (rows, ..., d_in) to (rows, ..., d_out)."""
    base: nn.Linear = layer.base_layer
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        cast = layer.cast
        if cast is None or cast[0].dtype != dtype:
            cast = (weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
        # Passes without gradients are many, and keep nothing else.
        layer.cast = cast if layer.keep_cast or not torch.is_grad_enabled() else None
        weight, bias = cast
        x = x.to(dtype)
    flat = x.reshape(-1, x.shape[-1])
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    d_in, d_out, rank = x.shape[-1], len(weight), len(a)
    # Merging in both passes, and computing the gradients of A and B from that of the weights, take 4 r d_in d_out
    # multiplications. Only fp32 is merged: in 16 bits small updates of W would be lost to rounding.
    saved = len(flat) * (3 * rank * (d_in + d_out) - d_in * d_out) - 4 * rank * d_in * d_out
    product = _Merged if x.dtype == torch.float32 and merging_is_cheaper(rank, d_in, d_out) and saved > 0 else _Added
    scaling, is_dora = layer.scaling["default"], layer.use_dora["default"]
    y: Tensor = product.apply(flat, weight, None if is_dora else bias, a, b, scaling)  # type: ignore[no-untyped-call]
    if is_dora:
        # The norm of each row of the weights has no gradient, as in the paper on DoRA.
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norms = torch.linalg.vector_norm(torch.addmm(base.weight.float(), b, a, alpha=scaling), dim=1)
        y = (y * (layer.lora_magnitude_vector["default"].weight / norms)).to(y.dtype)
        y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], y.shape[-1])


def _narrow(x: Tensor, factor: Tensor) -> Tensor:
    """Return the product (tokens, r) of (tokens, d) and (d, r).

    In fp32 a CPU takes up to five times as long for few columns as for few rows, at ranks below 16.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32 and factor.shape[1] < 16:
        return (factor.t() @ x.t()).t()
    return x @ factor


class _Added(torch.autograd.Function):
    """Computes x W' + scaling (x A') B' for x (tokens, d_in), W (d_out, d_in), A (r, d_in) and B (d_out, r)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        inner = _narrow(x, a.t()).mul_(scaling)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return y.addmm_(inner, b.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        g = gradients[0].contiguous()
        to_inner = _narrow(g, b).mul_(ctx.scaling)
        to_x = (g @ weight).addmm_(to_inner, a) if ctx.needs_input_grad[0] else None
        # Without transposing the result of the gradient of B a CPU takes up to seven times as long.
        return to_x, None, None, (to_inner.t() @ x).float(), (inner.t() @ g).t().float(), None


class _Merged(torch.autograd.Function):
    """Computes the same as `_Added` in fp32, with W + scaling B A (merged again in both passes) and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        y = x @ torch.addmm(weight, b, a, alpha=scaling).t()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        g, scaling = gradients[0].contiguous(), ctx.scaling
        to_x = g @ torch.addmm(weight, b, a, alpha=scaling) if ctx.needs_input_grad[0] else None
        to_weight = g.t() @ x
        return to_x, None, None, scaling * (b.t() @ to_weight), scaling * (to_weight @ a.t()), None
