"""What the first gradient says of the LR ratio with a frozen A, without a constant.

    python -m benchmarks.lr_first_gradient lr_ratio    # a preset whose datasets are tokenized in results/

Adam's first step of full fine-tuning (FullFT) lowers the loss by LR_F sum |G|, where G is a weight's gradient and the
sum is over all entries of all weights. That of LoRA, whose B starts at 0, lowers it by (alpha/r) LR_L sum |G A^T| over
the layers that carry LoRA, which are all linear ones but the unembedding. Both learn equally fast if LR_L / LR_F is the
ratio of the two. It is printed for each base, dataset and batch size of the preset's experiment `lr_ratio`, by rank, at
alpha 32, as the mean over batches and over random A (docs/lr-ratio.md).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lorabench.analysis.arms import ALPHA
from lorabench.data.tokens import cache_key, read_tokens
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import targets
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training.loss import batch_gradient
from lorabench.training.run import data_order, machine_of

RANKS = (1, 4, 16, 64)
BATCHES = 4


def first_ratio(total: float, gradients: list[Tensor], rank: int, generator: torch.Generator) -> float:
    """Return the ratio for the sum of all sizes in FullFT, and gradients of layers with LoRA, each (d_out, d_in)."""
    lora = 0.0
    for gradient in gradients:
        d_in = gradient.shape[1]
        a = (2 * torch.rand(rank, d_in, generator=generator) - 1) / d_in**0.5
        lora += ALPHA / rank * (gradient @ a.T).abs().sum().item()
    return total / lora


def ratios(preset: str) -> Iterator[dict[str, object]]:
    """Yield the ratio by rank for each base, dataset and batch size of the experiment `lr_ratio` of a preset."""
    layout = Layout.of(preset)
    plan = make_plan(layout.preset)
    machine = machine_of(plan)
    conditions = [sweep.condition for sweep in plan.sweeps if "lr_ratio" in sweep.experiments]
    for name, dataset, batch_size in dict.fromkeys((c.model, c.dataset, c.batch_size) for c in conditions):
        spec = layout.model(name)
        model = load_model(spec)
        layers, _ = targets(model, "all", include_unembedding=False)
        key = cache_key(load_tokenizer(spec), layout.dataset(dataset))
        train = read_tokens(layout.tokens(name, dataset), key)["train"]
        found: dict[int, list[float]] = {rank: [] for rank in RANKS}
        for batch in data_order(len(train), BATCHES, batch_size, layout.preset.first_seed):
            model.zero_grad()
            batch_gradient(model, train, batch, machine)
            total = sum(weight.grad.abs().sum().item() for weight in model.parameters() if weight.grad is not None)
            gradients = [model.get_parameter(f"{layer}.weight").grad for layer in layers]
            for rank in RANKS:
                generator = torch.Generator().manual_seed(len(found[rank]))
                found[rank].append(first_ratio(total, gradients, rank, generator))
        means = {f"r{rank}": float(np.mean(values)) for rank, values in found.items()}
        yield {"model": name, "dataset": dataset, "batch_size": batch_size, **means}


if __name__ == "__main__":
    print(pd.DataFrame(ratios(sys.argv[1])).to_string(index=False, float_format="{:.3g}".format))
