"""Tables `runs` and `curves` with known answers: losses are exact parabolas in log LR, seed noise is given by hand."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lorabench.store.tables import Tables

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
CURVATURE = 0.1  # nats per squared unit of log LR
OFFSETS = (0.0, 0.004, -0.004)  # of the final loss, by seed: the same luck in every arm, so that pairs cancel it
INTEGERS = ("rank", "batch_size", "steps", "seed", "train_tokens")
FLOATS = ("final_valid_nll", "final_test_nll", "base_reward", "final_valid_reward", "final_reward", "best_reward")
FLOATS += ("constant_reward", "rule_reward", "final_entropy", "final_truncated")

ArmTables = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def arm(
    rank: int | None = None,
    *,
    optimum: float,
    floor: float = 2.0,
    lrs: Sequence[float] = LRS,
    offsets: Sequence[float] = OFFSETS,
    diverges_from: float = math.inf,
    around: int = 0,
    model: str = "tiny",
    dataset: str = "instruct",
    placement: str = "all",
    batch_size: int = 16,
    steps: int = 128,
    **columns: Any,
) -> ArmTables:
    """Return the runs and curves of one arm, which is FullFT if it has no rank.

    The first seed has all LRs, the others the best and `around` to both sides. `floor` is the final test loss at
    `optimum`. The curves do not depend on `floor`: they differ by LR and seed.
    """
    method = "fullft" if rank is None else "lora"
    best = min((lr for lr in lrs if lr < diverges_from), key=lambda lr: abs(math.log(lr / optimum)))
    repeated = [lr for lr in lrs if abs(lrs.index(lr) - lrs.index(best)) <= around]
    cells = [(lr, 0) for lr in lrs] + [(lr, seed) for seed in range(1, len(offsets)) for lr in repeated]
    runs, curves = [], []
    for lr, seed in cells:
        rest = "".join(f"-{name}{columns[name]}" for name in ("alpha", "init_a", "lr_ratio", "eps") if name in columns)
        run_id = f"{model}-{dataset}-{method}-{rank}-{placement}-{batch_size}-{steps}-{lr}-{seed}{rest}"
        excess = CURVATURE * math.log(lr / optimum) ** 2 + offsets[seed]
        diverged = lr >= diverges_from
        runs.append(
            {
                "run_id": run_id,
                "model": model,
                "dataset": dataset,
                "method": method,
                "rank": rank,
                "placement": None if rank is None else placement,
                "lr": lr,
                "batch_size": batch_size,
                "steps": steps,
                "seed": seed,
                "status": "diverged" if diverged else "done",
                "final_valid_nll": None if diverged else floor + excess + 0.1,
                "final_test_nll": None if diverged else floor + excess,
                "train_tokens": 100 * steps * batch_size,
                **columns,
            }
        )
        for step in STEPS:
            value = 5.0 if step == 0 else 2.0 + 1 / step + excess
            curves.append(
                {
                    "run_id": run_id,
                    "step": step,
                    "examples": step * batch_size,
                    "tokens": 100 * step * batch_size,
                    "split": "validation",
                    "metric": "nll",
                    "value": None if diverged and step > 4 else value,
                }
            )
    return runs, curves


def tables(arms: Iterable[ArmTables]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `runs` and `curves`, typed as `lorabench.store.io.read_table` gives them."""
    arms = list(arms)
    runs = pd.DataFrame([row for rows, _ in arms for row in rows])
    curves = pd.DataFrame([row for _, rows in arms for row in rows])
    return typed(runs, curves)


def typed(runs: pd.DataFrame, curves: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give the present columns the types that `lorabench.store.io.read_table` gives them."""
    runs = runs.astype(
        {name: "Int64" for name in INTEGERS if name in runs} | {name: float for name in FLOATS if name in runs}
    )
    return runs, curves.astype({"step": "Int64", "value": float})


def batches(gaps: dict[int, float], sigma: float = 0.002, spread: float = 0.0, shared: bool = False) -> Tables:
    """Make the tables of batches, by number, with the gap of LoRA to FullFT in each beyond what test examples do to an
    arm, which have a standard deviation and may be those of all batches."""
    runs, curves, losses, noise = [], [], [], np.random.default_rng(5)
    of_all = noise.normal(0, spread, (2, 100))
    for number, gap in gaps.items():
        of_batch = of_all if shared else noise.normal(0, spread, (2, 100))
        for rank, effects in zip((None, 64), of_batch, strict=True):
            floor = 2.0 + (gap if rank else 0.0) + effects.mean()
            own, points = arm(rank, optimum=1e-3, floor=floor, offsets=noise.normal(0, sigma, 5))
            for row in [*own, *points]:
                row["run_id"] += f"@{number}"
            for run in own:
                run["seed"] += 100 * number
                means = run["final_test_nll"] + effects - effects.mean()
                about = {"run_id": run["run_id"], "tokens": 1, "test_data": "data" if shared else f"data@{number}00"}
                losses += [about | {"example": example, "loss": mean} for example, mean in enumerate(means)]
            runs, curves = [*runs, *own], [*curves, *points]
    return Tables(*typed(pd.DataFrame(runs), pd.DataFrame(curves)), test_losses=pd.DataFrame(losses))
