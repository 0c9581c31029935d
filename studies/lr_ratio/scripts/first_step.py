"""What the first step says of the LR ratio with a frozen A, without a constant.

    python -m studies.lr_ratio.scripts.first_step lr_ratio    # a preset whose data are tokenized in results/
    python -m studies.lr_ratio.scripts.first_step lr_smollm2@100 --rank 16 --without-mean

Adam's first step of full fine-tuning (FullFT) changes each weight by LR_F in the direction of the sign of its gradient
G, which lowers the loss by LR_F sum |G|, over all entries of all weights. That of LoRA, whose B starts at 0, changes a
layer's weights by (alpha/r) LR_L sign(G A^T) A, which lowers it by (alpha/r) LR_L sum |G A^T| over the layers that
carry LoRA, which are all linear ones but the unembedding. Two ratios LR_L / LR_F follow:

- `gradient`: at which both lower the loss equally fast, for an infinitely small step;
- `line search`: that of the LRs with which each lowers the loss most in this one step, on examples other than those of
  the gradient. It counts how the loss bends along both steps too.

They are printed for each base, dataset and batch size of the preset's experiment `lr_ratio`, at alpha 32, as geometric
means over batches and random A, with the standard error of the mean. With `--without-mean` the rows of A are made
orthogonal to the mean input of their layer. `mean share` is the share of this mean in the mean square of the inputs, as
a mean over layers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lorabench.analysis.arms import ALPHA
from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import targets
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training.loss import batch_gradient, mean_nll
from lorabench.training.run import Machine, data_order, machine_of

BATCHES = 4
START, STEP, MOST = 1e-4, 2.0, 20
"""The first LR of a line search, the factor between its LRs, and their largest number."""


def first_ratio(total: float, gradients: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> float:
    """Return the ratio `gradient`, given the sum of the sizes of all entries of FullFT's gradients, and by layer with
    LoRA its gradient, (d_out, d_in), and A, (r, d_in)."""
    lora = sum(ALPHA / len(a) * (gradients[name] @ a.T).abs().sum().item() for name, a in factors.items())
    return total / lora


def lowest(losses: Mapping[float, float]) -> float:
    """Return the LR of the minimum of a parabola in ln LR through the lowest loss and its neighbours, by LR.

    It is NaN if the lowest loss is that of the lowest or of the highest LR.
    """
    lrs = sorted(losses)
    best = min(range(len(lrs)), key=lambda i: losses[lrs[i]])
    if best in (0, len(lrs) - 1):
        return math.nan
    near = lrs[best - 1 : best + 2]
    square, linear, _ = np.polyfit(np.log(near), [losses[lr] for lr in near], 2)
    return math.exp(-linear / 2 / square)


def best_lr(loss: Callable[[float], float], start: float) -> float:
    """Return the LR with the lowest loss, from a walk by factors of STEP that begins at an LR.

    It is NaN if MOST LRs do not bracket a lowest loss, as where a step raises the loss of other examples at any LR.
    """
    losses = {start: loss(start)}
    while math.isnan(found := lowest(losses)) and len(losses) < MOST:
        # Up first, and then on towards the lower end.
        down = min(losses, key=lambda lr: losses[lr]) == min(losses) and len(losses) > 1
        lr = min(losses) / STEP if down else max(losses) * STEP
        losses[lr] = loss(lr)
    return found


def input_means(
    model: nn.Module, layers: Mapping[str, nn.Module], split: TokenizedSplit, machine: Machine
) -> tuple[dict[str, Tensor], float]:
    """Return the mean input of each of a model's layers, (d_in,), over the tokens (and fillers) of a split, and the
    share of the mean in the mean square of the inputs, as a mean over layers."""
    means: dict[str, list[Tensor]] = {name: [] for name in layers}
    squares: dict[str, list[float]] = {name: [] for name in layers}

    def add(name: str, _: Any, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].float().flatten(0, -2)
        means[name].append(rows.mean(0))
        squares[name].append(rows.square().sum(1).mean().item())

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    mean_nll(model, split, machine)
    for hook in hooks:
        hook.remove()
    found = {name: torch.stack(of_passes).mean(0) for name, of_passes in means.items()}
    return found, float(np.mean([(mean @ mean).item() / np.mean(squares[name]) for name, mean in found.items()]))


def without(factor: Tensor, mean: Tensor) -> Tensor:
    """Return A, (r, d_in), with rows that are orthogonal to a layer's mean input."""
    return factor - torch.outer(factor @ mean, mean) / (mean @ mean)


def first_steps(
    model: nn.Module, train: TokenizedSplit, batch_size: int, rank: int, without_mean: bool, machine: Machine
) -> tuple[list[tuple[float, float]], float]:
    """Return both ratios for each of BATCHES batches of a dataset, and the share of the mean input; the model stays as
    it is."""
    layers, _ = targets(model, "all", include_unembedding=False)
    batches = list(data_order(len(train), BATCHES, batch_size, seed=0))
    modules = {layer: model.get_submodule(layer) for layer in layers}
    means, share = input_means(model, modules, train.chosen(np.arange(32)), machine)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, batch in enumerate(batches):
        others = train.chosen(np.concatenate(batches[:number] + batches[number + 1 :]))

        def best(step: Mapping[str, Tensor], start: float, others: TokenizedSplit = others) -> float:
            def loss(lr: float) -> float:
                for name, change in step.items():
                    model.get_parameter(name).data.copy_(weights[name] - lr * change)
                return mean_nll(model, others, machine)

            lr = best_lr(loss, start)
            for name in step:
                model.get_parameter(name).data.copy_(weights[name])
            return lr

        model.zero_grad()
        batch_gradient(model, train, batch, machine)
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        factors = {}
        for layer in layers:
            d_in = weights[f"{layer}.weight"].shape[1]
            a = (2 * torch.rand(rank, d_in, generator=generator) - 1) / d_in**0.5
            factors[f"{layer}.weight"] = without(a, means[layer]) if without_mean else a
        total = sum(gradient.abs().sum().item() for gradient in gradients.values())
        first = first_ratio(total, gradients, factors)
        fullft = best({name: gradient.sign() for name, gradient in gradients.items()}, START)
        lora = {name: ALPHA / rank * (gradients[name] @ a.T).sign() @ a for name, a in factors.items()}
        found.append((first, best(lora, fullft * first) / fullft))
    return found, share


def ratios(preset: str, ranks: Sequence[int], without_mean: bool) -> Iterator[dict[str, object]]:
    """Yield both ratios by rank for each base, dataset and batch size of the experiment `lr_ratio` of a preset."""
    layout = Layout.of(preset)
    plan = make_plan(layout.preset)
    conditions = [sweep.condition for sweep in plan.sweeps if "lr_ratio" in sweep.experiments]
    for name, dataset, batch_size in dict.fromkeys((c.model, c.dataset, c.batch_size) for c in conditions):
        spec = layout.model(name)
        key = cache_key(load_tokenizer(spec), layout.dataset(dataset))
        train = read_tokens(layout.tokens(name, dataset), key)["train"]
        for rank in ranks:
            steps, share = first_steps(load_model(spec), train, batch_size, rank, without_mean, machine_of(plan))
            logs = np.log(steps)
            # Where a line search found nothing, the mean is NaN.
            (gradient, searched), errors = np.exp(logs.mean(0)), logs.std(0, ddof=1) / math.sqrt(len(logs))
            row = {"model": name, "dataset": dataset, "batch_size": batch_size, "rank": rank, "mean share": share}
            yield row | {"gradient": gradient, "line search": searched, "log error": errors[1]}


def main() -> None:
    """Print the ratios of a preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", help="a preset whose datasets are tokenized in results/")
    parser.add_argument("--rank", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--without-mean", action="store_true", help="rows of A are orthogonal to the mean input")
    given = parser.parse_args()
    for number, row in enumerate(ratios(given.preset, given.rank, given.without_mean)):
        print(pd.DataFrame([row]).to_string(index=False, header=not number, float_format="{:.3g}".format), flush=True)


if __name__ == "__main__":
    main()
