"""Expand the blocks of a preset's experiments into sweeps, one per condition."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from lorabench.config.experiments import AutoLrs, Block, Protocol, RlExperiment, SftExperiment
from lorabench.config.models import ModelSpec
from lorabench.config.preset import Preset
from lorabench.data.identity import dataset_id
from lorabench.models.specs import dimensions, model_id
from lorabench.runs import PROTOCOL_VERSION, Condition, Lattice, Rollouts, Seeds, Sweep
from lorabench.utils.files import digest

# Number of LRs that a sweep with `lrs: auto` starts with.
_FIRST_LRS = 3
# The paper's law for Llama models, whose constants are in `lorabench.analysis.lr_law.PUBLISHED`: LR of full fine-tuning
# at width 2000, that of LoRA over it, and the exponent of the width.
_FULLFT, _LORA_OVER_FULLFT, _WIDTH, _EXPONENT = 5e-5, 10.0, 2000.0, 0.781
# In RL tinker-cookbook takes 4e-5 and 8e-5 for LoRA on GSM8K with 8B parameters, about a quarter of the law's 2.9e-4;
# the tiny bases need as much less.
_RL_SHARE = 0.25


def sft_conditions(preset: Preset, block: SftExperiment) -> Iterator[dict[str, Any]]:
    """Yield the condition's fields that a block's arms share, for each model, dataset and batch size."""
    for model, dataset, batch_size in product(block.models, block.datasets, block.batch_sizes):
        spec = preset.datasets[dataset]
        steps = int(spec.train * block.epochs) // batch_size
        yield {
            "task": "sft",
            "model": model,
            "dataset": dataset,
            "batch_size": batch_size,
            "steps": steps if block.steps is None else min(steps, block.steps),
            "identity": _identity(preset.models[model], dataset_id(spec), preset.protocol),
        }


def rl_conditions(preset: Preset, block: RlExperiment) -> Iterator[dict[str, Any]]:
    """Yield the condition's fields that a block's arms share, for each model and problem set."""
    rollouts = Rollouts(
        block.group_size,
        block.max_new_tokens,
        block.evaluations,
        tuple(block.held_out),
        block.held_out_samples,
        block.prompt,
        tuple(block.stop),
        block.mean_response_tokens,
        preset.execution.sampler,
    )
    for model, problems in product(block.models, block.problems):
        sets = [dataset_id(preset.problems[name]) for name in (problems, *block.held_out)]
        yield {
            "task": "rl",
            "model": model,
            "dataset": problems,
            "batch_size": block.problems_per_step * block.group_size,
            "steps": block.steps,
            "identity": _identity(preset.models[model], sets, preset.protocol),
            "rollouts": rollouts,
        }


def block_sweeps(
    preset: Preset, name: str, block: SftExperiment | RlExperiment, common: dict[str, Any]
) -> Iterator[Sweep]:
    """Yield the sweep of each arm of a block.

    Args:
        name: the experiment's name.
        common: the condition's fields that the arms share (see `sft_conditions` and `rl_conditions`).
    """
    eps = preset.protocol.eps if block.eps is None else block.eps
    for arm, grid, scale in _arms(block, preset.protocol):
        lattice = None
        if isinstance(grid, AutoLrs):
            start = grid.start or starting_lr(dimensions(preset.models[common["model"]]).hidden, common["task"])
            lattice = Lattice(grid.per_decade, grid.most - _FIRST_LRS, scale)
            lrs: tuple[float, ...] = lattice.around(start)
        else:
            lrs = tuple(lr * scale for lr in grid)
        best, around, every = block.seeds.best, block.seeds.around or block.seeds.best, block.seeds.every
        given = tuple((lr, every) for lr in lrs) if every > 1 else ()
        seeds = Seeds(best, around if lattice else 1, given)
        yield Sweep(Condition(**common, **arm, eps=eps), lrs, seeds, experiments=(name,), lattice=lattice)


def _arms(block: Block, protocol: Protocol) -> Iterator[tuple[dict[str, Any], list[float] | AutoLrs, float]]:
    """Yield the condition's fields of each arm, its LR grid, and the factor on the grid's LRs."""
    if block.lrs.fullft:
        absent = dict.fromkeys(("rank", "placement", "alpha", "init_a", "lr_ratio"))
        yield {"method": "fullft", **absent}, block.lrs.fullft, 1.0
    alphas = block.alphas or [protocol.alpha]
    # The first transform is the identity: p = q = 1.
    transforms = [[1.0, 1.0], *block.transforms]
    for placement, ranks in block.ranks.items():
        for rank, alpha, init_a, ratio, (p, q) in product(ranks, alphas, block.inits_a, block.lr_ratios, transforms):
            arm = {
                "method": "lora",
                "rank": rank,
                "placement": placement,
                "alpha": alpha * rank**block.alpha_power / (p * q),
                "init_a": init_a * p,
                "lr_ratio": ratio * q / p,
            }
            yield arm, block.lrs.lora, p


def _identity(model: ModelSpec, data: str | list[str], protocol: Protocol) -> str:
    """Return the hash of what determines a run's result besides the other fields of its condition, its LR and seed."""
    # Alpha and epsilon are fields of the condition.
    rules = protocol.model_dump(exclude={"alpha", "eps"})
    return digest([PROTOCOL_VERSION, model_id(model), data, rules])


def starting_lr(hidden_size: int, task: Literal["sft", "rl"]) -> float:
    """Return the LR in the middle of the first three, the same for LoRA and full fine-tuning.

    It is the geometric mean of the LRs that the paper's law gives the two methods, so that their grids overlap. The
    exponent of Llama serves all families: over widths of 1,024 to 8,192 the start is then within a factor of 3 of that
    for Qwen, which a walk of a step or two makes up for.
    """
    law: float = _FULLFT * math.sqrt(_LORA_OVER_FULLFT) * (_WIDTH / hidden_size) ** _EXPONENT
    return law * (_RL_SHARE if task == "rl" else 1.0)


def merge_sweeps(sweeps: Iterable[Sweep]) -> list[Sweep]:
    """Merge the sweeps of each condition into one, which has the LRs, seeds and experiments of all of them.

    If some have a lattice, the merged sweep walks on the finest one, starting from the LRs of all.
    """
    merged: dict[Condition, Sweep] = {}
    for sweep in sweeps:
        other = merged.get(sweep.condition)
        if other is not None:
            lattice = sweep.lattice or other.lattice
            if sweep.lattice and other.lattice:
                finest = max(other.lattice, sweep.lattice, key=lambda lattice: lattice.per_decade)
                lattice = replace(finest, further=max(other.lattice.further, sweep.lattice.further))
            sweep = Sweep(
                sweep.condition,
                lrs=tuple(sorted({*other.lrs, *sweep.lrs})),
                seeds=other.seeds.merged(sweep.seeds),
                experiments=tuple(dict.fromkeys((*other.experiments, *sweep.experiments))),
                lattice=lattice,
            )
        merged[sweep.condition] = sweep
    return list(merged.values())
