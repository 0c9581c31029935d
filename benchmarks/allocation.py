"""A training step with freed memory kept (`lorabench.utils.exhaustion`), against the C library's default.

    python -m benchmarks.allocation

Each turn trains in two new processes, one with and one without the setting, in alternating order. The program prints
the CPU milliseconds of a step (user and system) and the peak memory of both, and the median ratio over the turns, and
appends a row for each shape to `benchmarks/allocation.csv`.
"""

from __future__ import annotations

import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorabench.config.inputs import TinyModel
from lorabench.models.base import load_model, package_versions
from lorabench.training.run import machine_state
from lorabench.utils.exhaustion import keep_freed_memory

RESULTS = Path(__file__).with_suffix(".csv")
TURNS, STEPS = 5, 30
# Model, number of sequences, tokens per sequence.
SHAPES = [("llama-64", 8, 128), ("llama-128", 8, 128), ("llama-128", 32, 200)]


def one_process(kept: bool, name: str, sequences: int, length: int) -> tuple[float, int]:
    """Return the median CPU milliseconds of a step in this process, and its peak memory in MB."""
    torch.set_num_threads(1)
    if kept and not keep_freed_memory():
        sys.exit("this C library has no such setting: nothing to compare")
    model = load_model(TinyModel(kind="tiny", name=name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (sequences, length), generator=generator)
    steps = []
    for _ in range(STEPS):
        started = time.process_time()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(1000 * (time.process_time() - started))
    # The first steps warm up.
    return statistics.median(steps[5:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(shape: tuple[str, int, int]) -> dict[bool, list[tuple[float, int]]]:
    """Return the results of `one_process` of each turn, by whether freed memory is kept."""
    results: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for turn in range(TURNS):
        for kept in (turn % 2 == 0, turn % 2 == 1):
            command = [sys.executable, "-m", "benchmarks.allocation", json.dumps([kept, *shape])]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results[kept].append(tuple(json.loads(output)))
    return results


def main() -> None:
    """Measure each shape and append the results."""
    torch.set_num_threads(1)
    machine, versions = machine_state(torch.device("cpu")), package_versions()
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = ["date", "device", "threads", "python", "libc", "torch", "shape"]
            writer.writerow([*columns, "step_ms", "default_step_ms", "ratio", "peak_mb", "default_peak_mb"])
        for name, sequences, length in SHAPES:
            results = measure((name, sequences, length))
            ratio = statistics.median(b[0] / a[0] for a, b in zip(results[True], results[False], strict=True))
            kept, default = (
                [statistics.median(column) for column in zip(*results[key], strict=True)] for key in results
            )
            shape = f"{name}: {sequences} x {length} tokens"
            numbers = [round(kept[0], 1), round(default[0], 1), round(ratio, 3), round(kept[1]), round(default[1])]
            print("{}: {} ms, by default {} ms, ratio {}; peak {} MB, {} MB".format(shape, *numbers))
            facts = [machine["device"], 1, platform.python_version(), " ".join(platform.libc_ver())]
            writer.writerow([f"{datetime.now(UTC):%Y-%m-%d}", *facts, versions["torch"], shape, *numbers])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one_process(*json.loads(sys.argv[1]))))
    else:
        main()
