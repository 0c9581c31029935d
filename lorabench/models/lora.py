"""LoRA through PEFT, in the paper's parametrization.

W' = W + (alpha/r) B A with A uniform in +-1/sqrt(d_in) (PEFT's default initialization), B zero, and the same LR for
both (the paper, "Setting LoRA hyperparameters"). The unembedding may carry LoRA too, as the paper's parameter counts
imply.

In a mixture of experts each expert has a LoRA of its own, whose rank is the total rank divided by the number of active
experts, at least 1 (the paper, "Layers where LoRA is applied"), and whose scaling is alpha over that rank. The router
has none. Where a model keeps its experts fused in one parameter (gate and up as one matrix, all experts stacked), gate
and up share an A, so that there are fewer LoRA parameters than with separate matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lorabench.config.fields import SUFFIXES, Placement
from lorabench.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

# The pattern by which PEFT finds layers inside a module named `experts`; shared experts, always active, do not match.
_EXPERTS = r"experts\..+"


@dataclass(frozen=True)
class Targets:
    """Full names of the linear layers that carry LoRA, and of the parameters that do, each a stack of experts."""

    modules: list[str]
    parameters: list[str]


def in_expert(name: str) -> bool:
    """Return whether a module or parameter belongs to an expert, judging by its full name."""
    return "experts" in name.split(".")[:-1]


def targets(model: PreTrainedModel, placement: Placement, include_unembedding: bool) -> Targets:
    """Return the layers and parameters that carry LoRA in a placement.

    Raises:
        UserError: the model has no layer of that placement under a known name, or has experts that would silently get
            no LoRA.
    """
    import torch

    known = SUFFIXES[placement]
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    modules = [name for name in linear if name.rpartition(".")[2] in known]
    weights = {name: p for name, p in model.named_parameters() if not name.endswith("bias")}
    stacks = [n for n, p in weights.items() if p.ndim == 3 and in_expert(n) and n.rpartition(".")[2] in known]
    if not modules and not stacks:
        names = ", ".join(known)
        raise UserError(f"{type(model).__name__} has no layer for placement {placement!r}; known names: {names}")
    if placement != "attn":
        covered = {*stacks, *(f"{name}.weight" for name in modules)}
        uncovered = [name for name, p in weights.items() if p.ndim > 1 and in_expert(name) and name not in covered]
        if uncovered:
            raise UserError(f"{type(model).__name__} has expert weights that would get no LoRA, such as {uncovered[0]}")
    head = model.get_output_embeddings()
    unembedding = [name for name, module in model.named_modules() if module is head]
    return Targets(modules + (unembedding if include_unembedding else []), stacks)


def expert_rank(model: PreTrainedModel, rank: int) -> int:
    """Return the rank of an expert's LoRA: the total rank over the number of active experts, at least 1."""
    active = getattr(model.config, "num_experts_per_tok", None)
    if not active:
        raise UserError(f"the config of {type(model).__name__} lacks num_experts_per_tok, by which the rank is divided")
    return max(1, rank // int(active))


def add_lora(
    model: PreTrainedModel,
    rank: int,
    placement: Placement,
    alpha: float,
    include_unembedding: bool,
    seed: int,
    init_a: float = 1.0,
) -> PeftModel:
    """Put LoRA on a base model, which is then frozen; `.unload()` removes LoRA again.

    Args:
        model: the base model.
        rank: the rank; in a mixture of experts the total rank of the active experts.
        placement: the layers that carry LoRA.
        alpha: the numerator of the scaling alpha/r.
        include_unembedding: whether the unembedding carries LoRA too.
        seed: from which A is drawn.
        init_a: bound of A's initial entries in units of 1/sqrt(d_in).

    Raises:
        UserError: the model has no such layers, or PEFT put LoRA on other layers.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from tqdm import tqdm

    # PEFT's progress bars would start a thread, and when memory has run out such a start never returns.
    tqdm.monitor_interval = 0
    chosen = targets(model, placement, include_unembedding)
    names = {*chosen.modules, *chosen.parameters}
    config = LoraConfig(
        r=rank,
        rank_pattern={_EXPERTS: expert_rank(model, rank)} if any(map(in_expert, names)) else {},
        lora_alpha=alpha,
        target_modules=chosen.modules,
        target_parameters=chosen.parameters or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # Where embedding and unembedding are tied, only the unembedding carries LoRA, as intended.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # PEFT calls transformers by a deprecated name, which a user can't change.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # The rank of fused experts does take effect; PEFT looks for its pattern only among modules.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        peft_model = get_peft_model(model, config)
    layers = dict(lora_layers(peft_model))
    # PEFT rewrites the targets of some mixtures of experts, to load adapters that older versions saved.
    if layers.keys() != names:
        different = sorted(layers.keys() ^ names)
        raise UserError(f"PEFT did not put LoRA on the requested layers of {type(model).__name__}: see {different[0]}")
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_A["default"].weight.mul_(init_a)
    return peft_model


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield PEFT's LoRA layers, each with the name in the base model of the module or parameter that it adapts."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # For two parameters of a module PEFT nests two wrappers.
            path = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
            yield ".".join(path + ([module.parameter_name] if isinstance(module, ParamWrapper) else [])), module


def adapter_pairs(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Return A (r, d_in), B (d_out, r) and the scaling alpha/r by linear layer, without experts.

    The tensors are the parameters themselves, so they change in training.
    """
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
