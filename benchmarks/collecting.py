"""What it costs to collect many points of curves.

    python -m benchmarks.collecting

`lorabench step collect` merges jobs with 5 million points of curves on one core. The program prints the CPU seconds
(user and system) and the peak memory, and appends them to `benchmarks/collecting.csv`.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from lorabench.store.io import write_table
from lorabench.store.schemas import JOB

RESULTS = Path(__file__).with_suffix(".csv")
POINTS, RUNS, JOBS, TEST_EXAMPLES = 5_000_000, 5_000, 200, 100


def write_jobs(folder: Path, points: int, runs: int, jobs: int) -> list[Path]:
    """Write the files of jobs with runs that have `points` points of curves together, and return their paths."""
    generator = np.random.default_rng(0)
    own, per_run = runs // jobs, points // runs
    steps = np.tile(np.arange(per_run), own)
    split = pa.array(np.where(steps % 10 == 0, "validation", "train"))
    paths = []
    for job in range(jobs):
        values = generator.uniform(1, 9, len(steps))
        entries: dict[str, Any] = {"step": steps, "examples": steps * 32, "tokens": steps * 32_768, "split": split}
        entries |= {"metric": pa.array(["nll"] * len(steps)), "value": values}
        losses = {"loss": np.zeros(own * TEST_EXAMPLES, np.float32), "tokens": np.ones(own * TEST_EXAMPLES, np.int32)}
        columns: dict[str, Any] = {name: pa.nulls(own, JOB.field(name).type) for name in JOB.names}
        columns["run_id"] = pa.array([f"{job:06d}{run:06d}" for run in range(own)])
        columns |= {name: pa.array([name] * own) for name in ("model", "dataset", "method")}
        for name, each, nested in (("curve", per_run, entries), ("test_losses", TEST_EXAMPLES, losses)):
            kind = JOB.field(name).type
            structs = pa.table(nested, schema=pa.schema(list(kind.value_type))).to_struct_array().combine_chunks()
            offsets = pa.array(np.arange(own + 1) * each, pa.int32())
            columns[name] = pa.ListArray.from_arrays(offsets, structs, type=kind)
        paths.append(folder / f"{job}.parquet")
        write_table(pa.table(columns, schema=JOB), paths[-1])
    return paths


def collecting(folder: Path) -> tuple[float, int]:
    """Return the CPU seconds of collecting POINTS points, and its peak memory in bytes."""
    files = [str(path) for path in write_jobs(folder, POINTS, RUNS, JOBS)]
    command = [sys.executable, "-m", "lorabench.cli", "step", "collect", *files, "--out", str(folder / "tables")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    if code:
        sys.exit(f"collecting failed with status {code}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Measure and append the result."""
    import torch

    from lorabench.training.run import machine_state

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        seconds, peak = collecting(Path(folder))
        rows.append(["collect", f"{POINTS} points of {RUNS} runs in {JOBS} jobs", round(seconds, 1), peak // 10**6])
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    facts = [f"{datetime.now(UTC):%Y-%m-%d}", commit, machine_state(torch.device("cpu"))["device"]]
    facts += [platform.python_version(), pd.__version__, pa.__version__]
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = ["date", "commit", "device", "python", "pandas", "pyarrow", "part", "case"]
            writer.writerow([*columns, "cpu_seconds", "peak_mb"])
        for part, case, cpu, peak_mb in rows:
            print(f"{part} {case}: {cpu} CPU-s" + (f", peak {peak_mb} MB" if peak_mb else ""))
            writer.writerow([*facts, part, case, cpu, peak_mb])


if __name__ == "__main__":
    main()
