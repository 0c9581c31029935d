"""The one loss: NLL in nats, summed over scored tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from lorabench.data.tokens import TokenizedSplit
from lorabench.errors import UserError
from lorabench.training.batches import IGNORED, collate, micro_batches
from lorabench.training.distributed import ALONE, Processes, enter

if TYPE_CHECKING:
    from torch import nn


def nll_sum(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the NLL over scored targets, a scalar, in fp32.

    Logits are computed where a token is scored and nowhere else. The decoder and the unembedding are
    called as modules, so LoRA on either takes part.
    """
    return enter(model, _nll_sum, inputs, targets)


def _nll_sum(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = base.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
    scored = targets != IGNORED
    logits = base.get_output_embeddings()(hidden[scored])
    return torch.nn.functional.cross_entropy(logits.float(), targets[scored], reduction="sum")


def check_plain_head(model: nn.Module) -> None:
    """Refuse models that change logits after the unembedding, which `nll_sum` would leave out.

    Raises:
        UserError: the model scales or caps its logits.
    """
    config = model.config
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__} changes its logits ({name}); such models are not supported yet")


@torch.no_grad()
def mean_nll(
    model: nn.Module,
    split: TokenizedSplit,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: Processes = ALONE,
) -> float:
    """NLL in nats per scored token of a whole split, token-weighted."""
    total, count = 0.0, 0
    own = processes.share(split.lengths())
    for part in processes.even(micro_batches(split.lengths()[own], max_tokens), own[:0]):
        inputs, targets = (tensor.to(device) for tensor in collate(split, own[part]))
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            total += nll_sum(model, inputs, targets).item()
        count += int((targets != IGNORED).sum())
    return processes.total(total) / processes.total(count)
