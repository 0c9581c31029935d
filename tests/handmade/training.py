"""Training curves with known answers, beside the runs of `sft`: the same batches for one seed, in all arms."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .lora import difficulty
from .sft import ArmTables, arm

STEPS = 1024
RECORDED = tuple(sorted({round(step) for step in np.geomspace(1, STEPS, 140)}))
OWN = (0.0, 0.002, -0.002)  # what a seed does to the curve of one LoRA arm alone
FALL = 0.3  # nats per tenfold steps


def shared(step: float) -> float:
    """Return the loss at a step of the curve that the best arms share."""
    return 4.0 - FALL * math.log10(step)


def trained(
    rank: int | None = None,
    *,
    shape: Callable[[float], float] = shared,
    own: Sequence[float] = OWN,
    steps: int = STEPS,
    **settings: Any,
) -> ArmTables:
    """Return the runs and curves of one arm of `sft` with a training curve of each run.

    Args:
        shape: the loss by step at the optimal LR. Other LRs lose as much as in the end.
        own: what each seed adds to the curve of a LoRA arm, in units that grow with log(rank).
        settings: as for `sft.arm`.
    """
    runs, curves = arm(rank, steps=steps, **settings)
    lowest = settings.get("floor", 2.0) + 0.1
    for run in runs:
        if run["final_valid_nll"] is None:
            continue
        lost = run["final_valid_nll"] - lowest - settings.get("offsets", (0.0, 0.004, -0.004))[run["seed"]]
        # Each rank has its own share, so that it does not cancel between ranks.
        of_seed = 0.0 if rank is None else own[run["seed"] % len(own)] * (1 + math.log(rank, 4))
        curves += [
            {
                "run_id": run["run_id"],
                "step": step,
                "examples": step * run["batch_size"],
                "tokens": 100 * step * run["batch_size"],
                "split": "train",
                "metric": "nll",
                # All arms are the base model at the first step.
                "value": shape(step) + 0.2 * difficulty(run["seed"], step) + (lost + of_seed if step > 1 else 0.0),
            }
            for step in RECORDED
            if step <= steps
        ]
    return runs, curves
