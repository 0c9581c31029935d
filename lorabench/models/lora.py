"""LoRA through PEFT, in the paper's parametrisation.

W' = W + (alpha/r) B A with A uniform in +-1/sqrt(d_in) (PEFT's default initialisation), B zero, one LR
for both, and the unembedding included (paper.md, sections 1 and 2.1).

In a mixture of experts every expert has a LoRA of its own, whose rank is the total rank divided by the
number of active experts, at least 1, and whose scaling is alpha over that rank (paper.md, section 5).
The router carries none. Experts that a model keeps fused in one parameter (gate and up as one matrix,
all experts in one stack) share an A between gate and up, so they have fewer LoRA parameters than apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorabench.errors import UserError
from lorabench.models.placement import SUFFIXES, Placement

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# PEFT's regular expression for what lies inside a module named `experts`; shared experts are always active.
_EXPERTS = r"experts\..+"


@dataclass(frozen=True)
class Targets:
    """Full names of what carries LoRA: linear layers, and stacks of experts that are one parameter each."""

    modules: list[str]
    parameters: list[str]


def in_expert(name: str) -> bool:
    """Whether a module or parameter belongs to one of several experts, going by its full name."""
    return "experts" in name.split(".")[:-1]


def targets(model: PreTrainedModel, placement: Placement, include_unembedding: bool) -> Targets:
    """What carries LoRA in a placement.

    Raises:
        UserError: the model has no layer of that placement under a name this project knows, or has experts
            that would silently stay without LoRA.
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
        left_out = [name for name, p in weights.items() if p.ndim > 1 and in_expert(name) and name not in covered]
        if left_out:
            raise UserError(f"{type(model).__name__} has experts under a name without LoRA: {left_out[0]}")
    head = model.get_output_embeddings()
    unembedding = [name for name, module in model.named_modules() if module is head]
    return Targets(modules + (unembedding if include_unembedding else []), stacks)


def expert_rank(model: PreTrainedModel, rank: int) -> int:
    """Rank of one expert's LoRA: the total rank over the active experts, at least 1."""
    active = getattr(model.config, "num_experts_per_tok", None)
    if not active:
        raise UserError(f"config of {type(model).__name__} does not say num_experts_per_tok, which divides the rank")
    return max(1, rank // int(active))


def lora_config(
    model: PreTrainedModel, rank: int, placement: Placement, alpha: float, include_unembedding: bool
) -> LoraConfig:
    """PEFT's configuration of one condition."""
    from peft import LoraConfig

    chosen = targets(model, placement, include_unembedding)
    experts = any(in_expert(name) for name in (*chosen.modules, *chosen.parameters))
    return LoraConfig(
        r=rank,
        rank_pattern={_EXPERTS: expert_rank(model, rank)} if experts else {},
        lora_alpha=alpha,
        target_modules=chosen.modules,
        target_parameters=chosen.parameters or None,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_lora(
    model: PreTrainedModel,
    rank: int,
    placement: Placement,
    alpha: float,
    include_unembedding: bool,
    seed: int,
    init_a: float = 1.0,
    adapter: str = "default",
) -> PeftModel:
    """Put LoRA on a base model, A drawn from `seed`; the base is frozen. `.unload()` takes it off again.

    Args:
        init_a: bound of A's initial entries in units of 1/sqrt(d_in).
        adapter: its name to PEFT.

    Raises:
        UserError: the model has no such layers, or PEFT put LoRA elsewhere than asked.
    """
    import torch
    from peft import get_peft_model

    config = lora_config(model, rank, placement, alpha, include_unembedding)
    wanted = {*config.target_modules, *(config.target_parameters or ())}
    torch.manual_seed(seed)
    with _without_idle_warnings():
        peft_model = get_peft_model(model, config, adapter_name=adapter)
    layers = dict(lora_layers(peft_model))
    # PEFT rewrites the targets of some mixtures of experts, to load what older versions saved.
    if layers.keys() != wanted:
        differ = sorted(layers.keys() ^ wanted)
        raise UserError(f"PEFT put LoRA elsewhere than asked in {type(model).__name__}, for one at {differ[0]}")
    _scale_a(peft_model, adapter, init_a)
    return peft_model


def add_lane(model: PeftModel, adapter: str, seed: int, init_a: float = 1.0) -> None:
    """Put another adapter on a model, of the same kind as the one it has, and make it the one that is trained.

    It starts as `add_lora` with that seed would have it.
    """
    import torch

    config = replace(model.active_peft_config)
    torch.manual_seed(seed)
    with _without_idle_warnings():
        model.add_adapter(adapter, config)
    model.set_adapter(adapter)
    _scale_a(model, adapter, init_a)


@contextmanager
def _without_idle_warnings() -> Iterator[None]:
    """Without those of PEFT that are about nothing."""
    with warnings.catch_warnings():
        # Of a tied pair the unembedding alone carries LoRA, as meant; the embedding stays as it was.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # PEFT asks transformers by an old name; a user can do nothing about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # The rank of fused experts does take effect; PEFT looks for its pattern among modules only.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        yield


def _scale_a(model: PeftModel, adapter: str, init_a: float) -> None:
    import torch

    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_A[adapter].weight.mul_(init_a)


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers by the name, in the base model, of the module or parameter that each adapts."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            # Two parameters of one module are wrapped one around the other.
            path = [part for part in name.removeprefix("base_model.model.").split(".") if part != "base_layer"]
            yield ".".join(path + ([module.parameter_name] if isinstance(module, ParamWrapper) else [])), module


def adapter_pairs(
    model: torch.nn.Module, adapter: str = "default"
) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """A (r, d_in), B (d_out, r) and scaling alpha/r of an adapter in each linear layer with LoRA, experts left out.

    The tensors are the parameters themselves, so they follow the training.
    """
    return {
        name: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
        for name, layer in lora_layers(model)
        if not in_expert(name)
    }
