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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

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


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of a layer, or of A x: their mean, (d_in,), and their mean square, over tokens (and
    fillers)."""

    mean: Tensor
    square: float

    @property
    def share(self) -> float:
        """The share of the mean in the mean square."""
        return (self.mean @ self.mean).item() / self.square


def layer_inputs(
    model: PreTrainedModel, split: TokenizedSplit, machine: Machine, factors: Mapping[str, Tensor] | None = None
) -> dict[str, Inputs]:
    """Return the inputs of each layer that carries LoRA, over a split, or those times the A's that are given."""
    means, squares = defaultdict[str, list[Tensor]](list), defaultdict[str, list[float]](list)

    def add(name: str, _: Any, inputs: tuple[Tensor]) -> None:
        rows = inputs[0].float().flatten(0, -2)
        rows = rows if factors is None else rows @ factors[name].T
        means[name].append(rows.mean(0))
        squares[name].append(rows.square().sum(1).mean().item())

    layers, _ = targets(model, "all", include_unembedding=False)
    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(add, name)) for name in layers]
    mean_nll(model, split, machine)
    for hook in hooks:
        hook.remove()
    return {name: Inputs(torch.stack(means[name]).mean(0), float(np.mean(squares[name]))) for name in layers}


def mean_share(inputs: Mapping[str, Inputs]) -> float:
    """Return the share of the mean input in the mean square, as a mean over layers."""
    return float(np.mean([layer.share for layer in inputs.values()]))


def without(factor: Tensor, mean: Tensor) -> Tensor:
    """Return A, (r, d_in), with rows that are orthogonal to a layer's mean input."""
    return factor - torch.outer(factor @ mean, mean) / (mean @ mean)


def random_a(
    rank: int, generator: torch.Generator, without_mean_of: Mapping[str, Inputs] | None, layer: str, d_in: int
) -> Tensor:
    """Return a new A of a layer, (rank, d_in), with rows that are orthogonal to its mean input if inputs are given."""
    a = (2 * torch.rand(rank, d_in, generator=generator) - 1) / d_in**0.5
    return a if without_mean_of is None else without(a, without_mean_of[layer].mean)


def first_steps(
    model: PreTrainedModel,
    train: TokenizedSplit,
    batch_size: int,
    make_a: Callable[[str, int], Tensor],
    machine: Machine,
) -> list[tuple[float, float]]:
    """Return both ratios for each of BATCHES batches of a dataset; the model stays as it is.

    `make_a` returns the A, (r, d_in), of a layer, given its name and d_in, anew for each batch.
    """
    layers, _ = targets(model, "all", include_unembedding=False)
    batches = list(data_order(len(train), BATCHES, batch_size, seed=0))
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
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
        factors = {f"{layer}.weight": make_a(layer, weights[f"{layer}.weight"].shape[1]) for layer in layers}
        total = sum(gradient.abs().sum().item() for gradient in gradients.values())
        first = first_ratio(total, gradients, factors)
        fullft = best({name: gradient.sign() for name, gradient in gradients.items()}, START)
        lora = {name: ALPHA / len(a) * (gradients[name] @ a.T).sign() @ a for name, a in factors.items()}
        found.append((first, best(lora, fullft * first) / fullft))
    return found


def ratios(preset: str, ranks: Sequence[int], without_mean: bool) -> Iterator[dict[str, object]]:
    """Yield both ratios by rank for each base, dataset and batch size of the experiment `lr_ratio` of a preset."""
    layout = Layout.of(preset)
    plan = make_plan(layout.preset)
    conditions = [sweep.condition for sweep in plan.sweeps if "lr_ratio" in sweep.experiments]
    for name, dataset, batch_size in dict.fromkeys((c.model, c.dataset, c.batch_size) for c in conditions):
        spec = layout.model(name)
        key = cache_key(load_tokenizer(spec), layout.dataset(dataset))
        train = read_tokens(layout.tokens(name, dataset), key)["train"]
        model, machine = load_model(spec), machine_of(plan)
        inputs = layer_inputs(model, train.chosen(np.arange(32)), machine)
        for rank in ranks:
            generator = torch.Generator().manual_seed(0)
            make_a = partial(random_a, rank, generator, inputs if without_mean else None)
            logs = np.log(first_steps(model, train, batch_size, make_a, machine))
            # Where a line search found nothing, the mean is NaN.
            (gradient, searched), errors = np.exp(logs.mean(0)), logs.std(0, ddof=1) / math.sqrt(len(logs))
            row = {
                "model": name,
                "dataset": dataset,
                "batch_size": batch_size,
                "rank": rank,
                "mean share": mean_share(inputs),
            }
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
