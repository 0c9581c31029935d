"""LoRA through PEFT, in the paper's parametrisation.

W' = W + (alpha/r) B A with A uniform in +-1/sqrt(d_in) (PEFT's default initialisation), B zero, one LR
for both, and the unembedding included (paper.md, sections 1 and 2.1).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from lorabench.errors import UserError
from lorabench.models.placement import SUFFIXES, Placement

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def target_modules(model: PreTrainedModel, placement: Placement, include_unembedding: bool) -> list[str]:
    """Full names of the linear layers that carry LoRA.

    Raises:
        UserError: the model has no layer of that placement under a name this project knows.
    """
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = [name for name in linear if name.rpartition(".")[2] in SUFFIXES[placement]]
    if not chosen:
        known = ", ".join(SUFFIXES[placement])
        raise UserError(f"{type(model).__name__} has no layer for placement {placement!r}; known names: {known}")
    head = model.get_output_embeddings()
    unembedding = [name for name, module in model.named_modules() if module is head]
    return chosen + (unembedding if include_unembedding else [])


def lora_config(
    model: PreTrainedModel, rank: int, placement: Placement, alpha: float, include_unembedding: bool
) -> LoraConfig:
    """PEFT's configuration of one condition."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=target_modules(model, placement, include_unembedding),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_lora(
    model: PreTrainedModel, rank: int, placement: Placement, alpha: float, include_unembedding: bool, seed: int
) -> PeftModel:
    """Put LoRA on a base model, A drawn from `seed`; the base is frozen. `.unload()` takes it off again."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # Of a tied pair the unembedding alone carries LoRA, as meant; the embedding stays as it was.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        # PEFT asks transformers by an old name; a user can do nothing about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, lora_config(model, rank, placement, alpha, include_unembedding))
