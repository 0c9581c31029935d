"""Tables `runs` and `curves` of RL with known answers: accuracies are parabolas in log LR, no lower than the base's."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from . import sft
from .sft import ArmTables

LRS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
OFFSETS = (0.0, 0.004, -0.004)  # of every accuracy, by seed: the same luck in every arm
BASE = 0.1
CURVATURE = 0.04  # accuracy lost per squared unit of log LR
STEPS = 20
AIME = {"aime24": 0.3, "aime25": 0.2}
SAMPLES = 30 * 16

Series = Callable[[float], float]
"""Function from the share of the steps done, 0 to 1, to the value of a metric."""


def grown(start: float, end: float) -> Series:
    return lambda done: start + (end - start) * done


def arm(
    rank: int | None = None,
    *,
    optimum: float,
    peak: float = 0.8,
    curvature: float = CURVATURE,
    lrs: Sequence[float] = LRS,
    offsets: Sequence[float] = OFFSETS,
    best_gain: float = 0.0,
    sets: dict[str, float] = AIME,
    train: dict[str, Series] | None = None,
    **columns: Any,
) -> ArmTables:
    """Return the runs and curves of one arm as `sft.arm` does, with these columns.

    `peak` is its final test accuracy at `optimum`, `best_gain` the increase of that accuracy at its best evaluation,
    `sets` the final accuracies on held-out problem sets (which all start at 0.02), and `train` replaces metrics of the
    training steps.
    """
    fixed = {"dataset": "problems", "batch_size": 64, "steps": STEPS, "task": "rl", "base_reward": BASE}
    fixed |= {"constant_reward": 0.02, "rule_reward": BASE}
    runs, curves = sft.arm(rank, optimum=optimum, lrs=lrs, offsets=offsets, **fixed | columns)[0], []
    for run in runs:
        final = max(BASE, min(1.0, peak - curvature * math.log(run["lr"] / optimum) ** 2 + offsets[run["seed"]]))
        diverged = run["status"] == "diverged"
        for name in ("final_valid_nll", "final_test_nll", "train_tokens"):
            del run[name]
        rewards = {"final_valid_reward": final, "final_reward": final, "best_reward": final + best_gain}
        run |= (dict.fromkeys(rewards) if diverged else rewards) | columns
        key = ("rl", run["model"], run["dataset"], run["method"], rank, columns.get("placement", "all"), run["lr"])
        run["run_id"] = "-".join(map(str, (*key, run["seed"])))
        metrics: dict[tuple[str, str], Series] = {
            ("train", "reward"): grown(BASE, final),
            ("train", "response_length"): grown(200, 400),
            ("train", "truncated"): grown(0, 0.01),
            ("train", "reflection"): grown(0, 0.2),
            ("train", "equal_groups"): lambda done: float(done == 0.5),
            ("train", "kl"): grown(0, 0.004),
            ("train", "grad_norm"): lambda done: 0.3 * (done != 0.5),
        }
        metrics |= {("train", name): series for name, series in (train or {}).items()}
        metrics |= {(split, "accuracy"): grown(BASE, final) for split in ("validation", "test")}
        for name, accuracy in sets.items():
            metrics |= {(name, "accuracy"): grown(0.02, accuracy), (name, "n_samples"): grown(SAMPLES, SAMPLES)}
        for (split, metric), series in metrics.items():
            steps = range(1, STEPS + 1) if split == "train" else (0, STEPS // 2, STEPS)
            curves += [
                {"run_id": run["run_id"], "step": step, "examples": 64 * step, "tokens": 64 * 300 * step}
                | {"split": split, "metric": metric, "value": series(step / STEPS)}
                for step in steps
                if not (diverged and step > 4)
            ]
    return runs, curves
