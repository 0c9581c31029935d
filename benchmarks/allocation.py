"""A training step with freed memory kept (`lorabench.utils.exhaustion`), by default, and with another allocator.

    python -m benchmarks.allocation
    python -m benchmarks.allocation --preload path/to/libjemalloc.so.2

In each turn new processes train, one for each allocator, in alternating order. The program prints the CPU milliseconds
of a step (user and system) and the peak memory of each, and the median over the turns of the time by default over that
of the allocator, and appends a row for each shape and allocator to `benchmarks/allocation.csv`. A shape with examples
of different lengths allocates blocks of many sizes, among which glibc searches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks.speed.models import SMOLLM2, is_there, loaded
from lorabench.analysis.arms import ALPHA
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.base import package_versions
from lorabench.models.bf16_products import choose_faster
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.passes import trained_parameters
from lorabench.store.io import write_csv
from lorabench.training.loss import batch_gradient
from lorabench.training.run import Machine, machine_state
from lorabench.utils.exhaustion import keep_freed_memory

RESULTS = Path(__file__).with_suffix(".csv")
TURNS, STEPS, WARM_UP, MAX_TOKENS = 3, 20, 5, 4096


class Shape(NamedTuple):
    """What is trained: a model, its rank of LoRA (0 for full fine-tuning), and a batch."""

    model: str
    rank: int
    sequences: int
    shortest: int
    longest: int

    def __str__(self) -> str:
        lengths = f"{self.shortest}" + (f" to {self.longest}" if self.longest > self.shortest else "")
        return f"{self.model} {f'r{self.rank}' if self.rank else 'fullft'}: {self.sequences} x {lengths} tokens"


SHAPES = (
    Shape("llama-64", 0, 8, 128, 128),
    Shape("llama-128", 0, 32, 200, 200),
    Shape("llama-128", 16, 8, 40, 200),
    Shape(SMOLLM2, 0, 8, 40, 200),
    Shape(SMOLLM2, 64, 8, 40, 200),
)


def one_process(shape: Shape, kept: bool) -> tuple[float, int]:
    """Return the median CPU milliseconds of a step in this process, and its peak memory in MB."""
    torch.set_num_threads(1)
    if kept and not keep_freed_memory():
        sys.exit("this C library has no such setting: nothing to compare")
    bf16 = choose_faster() if shape.model == SMOLLM2 else None
    machine = Machine(torch.device("cpu"), MAX_TOKENS, autocast=torch.bfloat16 if bf16 else None)
    model = loaded(shape.model, machine.device)
    if shape.rank:
        model = add_lora(model, shape.rank, "all", ALPHA, include_unembedding=False, seed=0)
        use_fast_products(model)
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.0, fused=True)
    generator = np.random.default_rng(0)
    lengths = generator.integers(shape.shortest, shape.longest + 1, STEPS * shape.sequences)
    ids = generator.integers(model.config.vocab_size, size=lengths.sum()).astype(np.int32)
    split = TokenizedSplit(ids, np.ones(len(ids), bool), np.concatenate([[0], lengths.cumsum()]))
    steps = []
    for batch in np.arange(len(lengths)).reshape(STEPS, -1):
        started = time.process_time()
        optimizer.zero_grad()
        batch_gradient(model, split, batch, machine)
        optimizer.step()
        steps.append(1000 * (time.process_time() - started))
    return statistics.median(steps[WARM_UP:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(shape: Shape, library: Path | None) -> pd.DataFrame:
    """Return the median milliseconds, ratio and peak memory of each allocator; a library is one to preload."""
    preloaded: dict[str, dict[str, str]] = {"default": {}, "kept": {}}
    if library:
        preloaded[library.name.partition(".")[0]] = {"LD_PRELOAD": str(library)}
    results: dict[str, list[tuple[float, int]]] = {allocator: [] for allocator in preloaded}
    for turn in range(TURNS):
        for allocator in sorted(preloaded, reverse=turn % 2 == 1):
            command = [sys.executable, "-m", "benchmarks.allocation", "--one", json.dumps([shape, allocator == "kept"])]
            environment = os.environ | preloaded[allocator]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results[allocator].append(tuple(json.loads(done.stdout)))
    return pd.DataFrame(
        {
            "shape": str(shape),
            "allocator": allocator,
            "step_ms": round(statistics.median(ms for ms, _ in turns), 1),
            "ratio": round(statistics.median(a[0] / b[0] for a, b in zip(results["default"], turns, strict=True)), 3),
            "peak_mb": round(statistics.median(mb for _, mb in turns)),
        }
        for allocator, turns in results.items()
    )


def main() -> None:
    """Measure each shape and append the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preload", type=Path, help="the file of another allocator's library, to be measured too")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one_process(Shape(*given.one[0]), given.one[1])))
        return
    if given.preload and not given.preload.is_file():
        parser.error(f"--preload: there is no file {given.preload}")
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "device": machine_state(torch.device("cpu"))["device"],
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
        "torch": package_versions()["torch"],
    }
    for shape in SHAPES:
        if not is_there(shape.model):
            print(f"{shape}: left out, since the model is not here; `lorabench step convert {shape.model}` gets it")
            continue
        measured = measure(shape, given.preload)
        print(measured.to_string(index=False), flush=True)
        earlier = [pd.read_csv(RESULTS)] if RESULTS.is_file() else []
        write_csv(pd.concat([*earlier, measured.assign(**facts)[[*facts, *measured.columns]]]), RESULTS)


if __name__ == "__main__":
    main()
