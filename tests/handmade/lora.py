"""LoRA runs and training curves in which the theory of the parametrization holds exactly; tests change parts of it."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from .sft import typed

RECORDED = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@cache
def difficulty(seed: int, step: int) -> float:
    """Return the excess NLL of a batch over the average in nats, which is the same for all runs with one seed."""
    return float(0.05 * np.random.default_rng([seed, step]).standard_normal())


@cache
def luck(*key: int, size: float) -> float:
    """Return a small number that depends on the key alone."""
    return float(size * np.random.default_rng(list(key)).standard_normal())


def nll(run: Mapping[str, Any], step: int) -> float:
    """Return the training NLL, whose first decrease is proportional to the update scale; it falls faster as A moves."""
    update, time = run["alpha"] * run["init_a"] * run["lr"] * run["lr_ratio"], run["init_a"] / run["lr"]
    fall = 2 * (1 - math.exp(-update * (step - 1))) + 1e-5 * (step - 1) ** 2 / (1 + time / 1e3)
    return 3.0 + difficulty(run["seed"], step) - fall


def a_moved(run: Mapping[str, Any], step: int) -> float:
    """Return the movement of A, which grows in inverse proportion to the time scale from the second step on."""
    return (step - 1) * 20 / (run["init_a"] / run["lr"])


def descent(run: Mapping[str, Any], step: int) -> float:
    """Return the first descent: 1/r times r terms of equal size, and noise of the initial A."""
    if step > 1:
        return 0.1
    noise = luck(run["rank"], run["seed"], size=0.01)
    return (1 + noise) * (1 + luck(run["seed"], size=0.2)) * run["alpha"] * run["lr"] * run["lr_ratio"]


def update_norm(run: Mapping[str, Any], step: int) -> float:
    """Return the norm of an update, which grows with B and differs slightly by seed."""
    return run["lr"] * (1 + (0.1 + luck(run["seed"], size=0.01)) * (step - 1))


def b_over_a(run: Mapping[str, Any], step: int) -> float:
    return 0.8 + luck(run["seed"], size=0.02)


METRICS = {metric.__name__: metric for metric in (nll, a_moved, descent, update_norm, b_over_a)}


def lora_run(rank: int = 8, *, seed: int = 0, lr: float = 1e-3, steps: int = 64, **columns: Any) -> dict[str, Any]:
    """Return one row of `runs`, in the standard parametrization except for the given columns."""
    row = {
        "model": "tiny",
        "dataset": "instruct",
        "method": "lora",
        "rank": rank,
        "placement": "all",
        "alpha": 32.0,
        "init_a": 1.0,
        "lr_ratio": 1.0,
        "eps": 1e-30,
        "lr": lr,
        "batch_size": 8,
        "steps": steps,
        "seed": seed,
        "status": "done",
        "final_valid_nll": 2.1 + luck(seed, size=0.01),
        "final_test_nll": 2.0 + luck(seed, size=0.01),
        **columns,
    }
    name = ("model", "dataset", "rank", "alpha", "init_a", "lr_ratio", "eps", "lr", "steps", "seed")
    return {"run_id": "-".join(str(row[column]) for column in name), **row}


def lora_tables(
    runs: Iterable[dict[str, Any]], **changes: Callable[[Mapping[str, Any], int], float]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables `runs` and `curves` of the given runs, with the metrics above except for the changes."""
    runs, metrics = list(runs), METRICS | changes
    rows = []
    for run in runs:
        recorded = sorted(step for step in {*RECORDED, run["steps"]} if step <= run["steps"])
        for metric, value in metrics.items():
            steps = range(1, run["steps"] + 1) if metric == "nll" else recorded
            rows += [(run["run_id"], step, "train", metric, value(run, step)) for step in steps]
        # Validation is measured after a step's update, on examples of average difficulty.
        for step in (0, *recorded):
            loss = metrics["nll"](run, step + 1) - difficulty(run["seed"], step + 1)
            rows.append((run["run_id"], step, "validation", "nll", loss))
    curves = pd.DataFrame(rows, columns=["run_id", "step", "split", "metric", "value"])
    return typed(pd.DataFrame(runs), curves)
