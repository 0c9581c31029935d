"""What it costs to judge, draw and report many finished runs.

    python -m benchmarks.judging [RUNS ...]

For about 1,000, 10,000 and 100,000 runs, or other numbers, tables are made as training would leave them. Then
`lorabench claims`, `lorabench figure all` and `lorabench step report` run one after the other; of these, only `claims`
uses several cores, and only for many runs. The program prints the CPU seconds (user and system), the seconds that
passed, the peak memory of each and the size of the page, and appends them to `benchmarks/judging.csv`.

The tables have the sizes that a study of so many runs would have: 100,000 runs are 64 models on 10 datasets. Each model
and dataset has FullFT and five ranks at batch 32, two placements, and FullFT and two ranks at batches 8 and 128, on one
pass over the same data; each model also has FullFT and two ranks of reinforcement learning. An arm has 11 runs: 5
learning rates, and two further seeds at the middle three. A curve has 40 points, or 320 over nine metrics in
reinforcement learning, since a run of as many steps would have its train points thinned. A run has the losses of 140
test examples in 35 groups, 14 million rows in all, as each loss by example counts for the error of a verdict.
"""

from __future__ import annotations

import csv
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml

from lorabench.store.io import write_frame, write_tables
from lorabench.store.layout import Layout
from lorabench.store.schemas import CURVES, TEST_LOSSES

RESULTS = Path(__file__).with_suffix(".csv")
SIZES = (1_000, 10_000, 100_000)
MODELS_AND_DATASETS = {1_000: (3, 2), 10_000: (12, 5)}
"""The numbers of models and of datasets by number of runs; of other numbers, see `models_and_datasets`."""

TEST_EXAMPLES, GROUPS = 140, 35
EXAMPLES = 32_000  # of a pass over the training data
LRS = {"fullft": 1e-5 * 10 ** (np.arange(5) / 3), "lora": 1e-4 * 10 ** (np.arange(5) / 3)}
SFT_ARMS = [
    *((32, "fullft", None, None), *((32, "lora", rank, "all") for rank in (1, 4, 16, 64, 256))),
    *((32, "lora", 256, placement) for placement in ("mlp", "attn")),
    *((size, *arm) for size in (8, 128) for arm in (("fullft", None, None), ("lora", 16, "all"), ("lora", 256, "all"))),
]
"""Batch size, method, rank and placement."""

RL_ARMS = [(64, "fullft", None, None), (64, "lora", 1, "all"), (64, "lora", 16, "all")]
RL_STEPS = 100
BLOCK: dict[str, Any] = {"models": ["tiny"], "ranks": {"all": [1]}, "lrs": {"fullft": [1e-3], "lora": [1e-2]}}
PRESET = {
    "description": "many runs",
    "models": {"tiny": {"kind": "tiny"}},
    "datasets": {"instruct": {"kind": "instruct", "train": 64, "validation": 8, "test": 8, "max_chars": 240}},
    "problems": {
        "gcd": {"kind": "arithmetic", "tasks": ["gcd"], "max_value": 50, "train": 8, "validation": 8, "test": 8}
    },
    "experiments": {
        name: [{**BLOCK, "datasets": ["instruct"], "batch_sizes": [32]}]
        for name in ("rank", "batch_size", "placement", "capacity", "lr_law", "early")
    }
    | {
        "rl_arithmetic": [
            BLOCK
            | {"problems": ["gcd"], "problems_per_step": 8, "group_size": 8, "steps": RL_STEPS}
            | {"max_new_tokens": 8, "mean_response_tokens": 2, "evaluations": 2}
        ]
    },
    "margins": {"loss": 0.02, "reward": 0.1, "lr_factor": 1.6},
    "execution": {"gflops": 40.0},
}
"""A preset that has the figures of these tables; the plan on its own page is of a few runs."""


def models_and_datasets(runs: int) -> tuple[int, int]:
    """Return the numbers of models and datasets whose tables have about this number of runs."""
    per_pair, per_model = 11 * len(SFT_ARMS), 11 * len(RL_ARMS)
    return MODELS_AND_DATASETS.get(runs, (max(2, round(runs / (10 * per_pair + per_model))), 10))


def _experiments(task: str, batch_size: int, rank: int | None, placement: str | None) -> list[str]:
    """Return the experiments that an arm belongs to."""
    if task == "rl":
        return ["rl_arithmetic"]
    if placement in ("mlp", "attn"):
        return ["placement"]
    experiments = ["batch_size"] if rank in (None, 16, 256) else []
    if batch_size == 32:
        experiments += ["rank", "capacity", *(["lr_law", "placement"] if rank in (None, 256) else [])]
    return experiments


def runs_of(model: int, datasets: int, generator: np.random.Generator) -> pd.DataFrame:
    """Return the runs of one model, whose losses are parabolas in ln LR with noise of seeds."""
    rows = []
    arms = [("sft", f"data-{number}", arm) for number, arm in product(range(datasets), SFT_ARMS)]
    arms += [("rl", "problems", arm) for arm in RL_ARMS]
    width = 512 * 2 ** (model % 5)
    for task, dataset, (batch_size, method, rank, placement) in arms:
        lrs, steps = LRS[method], EXAMPLES // batch_size if task == "sft" else RL_STEPS
        optimum = generator.normal(0, 0.1) + math.log(lrs[2]) - (0.5 if rank == 1 else 0.0)
        lowest = 1.2 + 0.1 * (model % 5) + 0.02 / (rank or 512) + (0.02 if batch_size == 128 and rank else 0.0)
        experiments = _experiments(task, batch_size, rank, placement)
        cells = [(place, 0) for place in range(5)] + [(place, seed) for seed in (1, 2) for place in (1, 2, 3)]
        for place, seed in cells:
            off = math.log(lrs[place]) - optimum
            loss = lowest + 0.02 * off**2 + 0.003 * seed + generator.normal(0, 0.002)
            early = ["early"] if batch_size == 32 and placement == "all" and place == 2 else []
            rows.append(
                {
                    "run_id": f"{generator.integers(2**48):012x}",
                    "experiments": [*experiments, *early],
                    "model": f"model-{model}",
                    "dataset": dataset,
                    "task": task,
                    "data_kind": "hub",
                    "method": method,
                    "rank": rank,
                    "placement": placement,
                    "alpha": None if rank is None else 32.0,
                    "init_a": None if rank is None else 1.0,
                    "lr_ratio": None if rank is None else 1.0,
                    "eps": 1e-8,
                    "lr": lrs[place],
                    "batch_size": batch_size,
                    "steps": steps,
                    "seed": seed,
                    "status": "diverged" if place == 4 and seed == 0 and generator.random() < 0.1 else "done",
                    "loss": loss,
                    "family": ("llama", "qwen3")[model % 2],
                    "hidden_size": width,
                    "base_params": 1000 * width**2,
                    "trainable_params": 1000 * width * (rank or width),
                    "train_tokens": 500 * EXAMPLES,
                    "train_flops": 6e3 * width**2 * 500 * EXAMPLES * (2 / 3 if rank else 1.0),
                    "wall_s": 1000.0,
                    "peak_mem_bytes": 10**10,
                    "device": "H100",
                    "threads": 8,
                    "host": f"node{generator.integers(100)}",
                    "started": f"2026-11-{1 + model % 28:02d}T12:00:00+00:00",
                    "git_sha": "0" * 40,
                    "versions": '{"torch": "2.13.0", "transformers": "5.24.0", "peft": "0.20.0"}',
                    "model_sha256": f"{model:064x}",
                    "dataset_sha256": f"{sum(dataset.encode()):064x}",
                    "protocol": "1",
                }
            )
    runs = pd.DataFrame(rows)
    done, rl = runs["status"] == "done", runs["task"] == "rl"
    loss = runs.pop("loss")
    for name in ("final_valid_nll", "final_test_nll"):
        noise = generator.normal(0, 0.0005, len(runs))
        runs[name] = (loss + noise).where(done & ~rl)
    runs["final_train_nll"] = loss.where(done & ~rl)
    accuracy = (0.7 - 5 * (loss - loss[rl].min())).clip(0.2, 1)
    for name in ("final_valid_reward", "final_reward", "best_reward"):
        runs[name] = accuracy.where(done & rl)
    for name, value in {"base_reward": 0.2, "constant_reward": 0.1, "rule_reward": 0.15}.items():
        runs[name] = pd.Series(value, runs.index).where(rl)
    runs["diverged_at"] = runs["steps"].where(~done) // 2
    return runs


def curves_of(runs: pd.DataFrame, generator: np.random.Generator) -> Iterator[pa.Table]:
    """Yield the curves of runs: losses that fall with the logarithm of the step, and in RL metrics that grow."""
    for (rl, steps), group in runs.groupby([runs["task"] == "rl", "steps"]):
        at = {
            "train": np.unique(np.geomspace(1, steps, 36).round().astype(int)),
            "validation": np.unique([0, 50, 100, *np.linspace(0, steps, 8).astype(int)]),
        }
        end = group["final_reward" if rl else "final_train_nll"].fillna(1.5).to_numpy()
        batch_size = int(group["batch_size"].iloc[0])
        metrics = [("train", "nll"), ("validation", "nll")]
        if rl:
            names = ("reward", "response_length", "truncated", "reflection", "kl", "entropy", "equal_groups")
            metrics = [*(("train", name) for name in names), ("validation", "accuracy"), ("test", "accuracy")]
        for split, metric in metrics:
            points = at["train" if split == "train" else "validation"]
            points = points[points <= steps]
            left = 1 - np.log1p(points) / np.log1p(steps)
            values = end[:, None] + (1.5 if metric == "nll" else -0.2) * left
            values += generator.normal(0, 0.003, values.shape)
            step = np.tile(points, len(group))
            columns = {
                "run_id": np.repeat(group["run_id"].to_numpy(object), len(points)),
                "step": step,
                "examples": step * batch_size,
                "tokens": step * batch_size * 500,
                "split": [split] * len(step),
                "metric": [metric] * len(step),
                "value": values.ravel() * {"kl": 0.001, "response_length": 100.0}.get(metric, 1.0),
            }
            yield pa.table(columns, schema=CURVES)


def test_losses_of(runs: pd.DataFrame, generator: np.random.Generator) -> pa.Table:
    """Return the losses of runs by test example: in RL 0 or 1, in SFT nats that add up to the run's test loss."""
    examples = np.arange(TEST_EXAMPLES)
    done = runs[runs["status"] == "done"]
    rl = (done["task"] == "rl").to_numpy()[:, None]
    of_dataset = {
        name: np.random.default_rng(n).normal(0, 0.3, TEST_EXAMPLES)
        for n, name in enumerate(sorted(set(done["dataset"])))
    }
    hard = np.array([of_dataset[name] for name in done["dataset"]])
    own = generator.normal(0, 0.02, hard.shape)
    nats = 50 * (done["final_test_nll"].fillna(0).to_numpy()[:, None] + hard - hard.mean(1, keepdims=True) + own)
    wrong = generator.random(hard.shape) > done["final_reward"].fillna(0).to_numpy()[:, None]
    columns = {
        "run_id": np.repeat(done["run_id"].to_numpy(object), TEST_EXAMPLES),
        "example": np.tile(examples, len(done)),
        "loss": np.where(rl, wrong, nats).ravel(),
        "tokens": np.where(rl, 1, 50).repeat(TEST_EXAMPLES),
        "group": np.tile([f"document {number % GROUPS}" for number in examples], len(done)),
    }
    return pa.table({name: pa.array(values, TEST_LOSSES.field(name).type) for name, values in columns.items()})


def write_tables_of(runs: int, folder: Path) -> int:
    """Write the tables of about so many runs into a folder, and return the number of runs."""
    models, datasets = models_and_datasets(runs)
    generator = np.random.default_rng(0)
    by_model = [runs_of(model, datasets, generator) for model in range(models)]
    table = pd.concat(by_model, ignore_index=True)
    write_frame(table, "runs", folder)
    write_tables((part for rows in by_model for part in curves_of(rows, generator)), CURVES, folder / "curves.parquet")
    write_tables((test_losses_of(rows, generator) for rows in by_model), TEST_LOSSES, folder / "test_losses.parquet")
    return len(table)


def tree_bytes(pid: int) -> int:
    """Return the memory of a process and of those that it started, where pages that several share count once."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # It has ended.
        return 0
    own = next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return own + sum(tree_bytes(int(child)) for child in children)


def measured(*command: str) -> tuple[float, float, int]:
    """Run a command of lorabench, whose processes have one thread each.

    Returns:
        Its CPU seconds, the seconds it took and the peak memory in MB of all its processes, sampled twice a second.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    started, peak = time.monotonic(), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-m", "lorabench.cli", *command], env={**os.environ, **threads})
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"lorabench {' '.join(command)} failed with status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(cpu, 1), round(time.monotonic() - started, 1), peak // 10**6


def judging(runs: int) -> Iterator[list[Any]]:
    """Judge, draw and report about so many runs in this folder; yield the numbers of each part."""
    Path("many.yaml").write_text(yaml.safe_dump(PRESET))
    layout = Layout.of("many.yaml")
    tables = str(layout.tables())
    runs = write_tables_of(runs, layout.tables())
    parts = {
        "claims": ("claims", "--preset", "many.yaml", "--tables", tables, "--out", tables),
        "figure all": ("figure", "all", "--tables", tables, "--out", str(layout.figures)),
        "report": ("step", "report", "--preset", "many.yaml"),
    }
    for name, command in parts.items():
        numbers = measured(*command)
        page = round(layout.report.stat().st_size / 1e6, 2) if name == "report" else None
        yield [name, runs, *numbers, page]


def main() -> None:
    """Measure all sizes and append the results."""
    import torch

    from lorabench.training.run import machine_state

    command = ["git", "-C", str(RESULTS.parent), "describe", "--always"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    facts = [f"{datetime.now(UTC):%Y-%m-%d}", commit, machine_state(torch.device("cpu"))["device"]]
    facts += [platform.python_version(), pd.__version__, np.__version__]
    for size in [int(argument) for argument in sys.argv[1:]] or SIZES:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            for part, runs, cpu, seconds, peak_mb, page_mb in judging(size):
                page = f", page {page_mb} MB" if page_mb else ""
                print(f"{part} of {runs} runs: {cpu} CPU-s, {seconds} s, peak {peak_mb} MB{page}", flush=True)
                new = not RESULTS.exists()
                with RESULTS.open("a", newline="") as file:
                    writer = csv.writer(file, lineterminator="\n")
                    if new:
                        columns = ["date", "commit", "device", "python", "pandas", "numpy", "part", "runs"]
                        writer.writerow([*columns, "cpu_seconds", "seconds", "peak_mb", "page_mb"])
                    writer.writerow([*facts, part, runs, cpu, seconds, peak_mb, page_mb])


if __name__ == "__main__":
    main()
