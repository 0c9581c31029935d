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


def nll_sum(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the NLL over scored targets, a scalar, in fp32; the arguments are those of a `Batch`.

    Logits are computed where a token is scored and nowhere else. The decoder and the unembedding are
    called as modules, so LoRA on either takes part.
    """
    return enter(model, _nll_sum, inputs, targets, positions)


def _nll_sum(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None
) -> torch.Tensor:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = base.get_decoder()(input_ids=inputs, position_ids=positions, use_cache=False).last_hidden_state
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
def check_packing(model: nn.Module) -> None:
    """Refuse models in which an example sees those packed before it.

    Raises:
        UserError: the second of two packed examples changes with the first.
    """
    device = next(model.parameters()).device
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    first = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device)
    second = torch.tensor([9, 10, 11, 12], device=device)
    alone, beside = (
        model.get_decoder()(  # type: ignore[operator]
            input_ids=torch.cat([ids, second])[None], position_ids=positions, use_cache=False
        ).last_hidden_state[0, 4:]
        for ids in first
    )
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise UserError(f"{type(model).__name__} lets packed examples see each other; set execution.packing to false")


@torch.no_grad()
def mean_nll(
    model: nn.Module,
    split: TokenizedSplit,
    max_tokens: int,
    device: torch.device,
    autocast: torch.dtype | None,
    processes: Processes = ALONE,
    packing: bool = False,
) -> float:
    """NLL in nats per scored token of a whole split, token-weighted."""
    total, count = 0.0, 0
    own = processes.share(split.lengths())
    for part in processes.even(micro_batches(split.lengths()[own], max_tokens, packing=packing), own[:0]):
        batch = collate(split, [own[row] for row in part])
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            total += nll_sum(model, *batch.to(device)).item()
        count += batch.scored
    return processes.total(total) / processes.total(count)
