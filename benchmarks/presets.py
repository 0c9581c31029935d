"""The time that a whole preset takes at several commits, one after the other, from a fresh folder of results.

    python -m benchmarks.presets laptop 8fa421b8 HEAD --cores 1

Each commit is checked out in a folder of its own, where `snakemake` runs the preset with the packages of this
environment. The program prints the CPU seconds of all processes, the wall-clock seconds, and the number of runs, and
appends a row for each commit to `benchmarks/presets.csv`. Machines differ, so compare rows of one call.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.speed.table import REPOSITORY
from lorabench.utils.gpus import processor

RESULTS = Path(__file__).with_suffix(".csv")


def measure(preset: str, commit: str, cores: int) -> dict[str, object]:
    """Run a preset at a commit, and return a row of the table."""
    git = ["git", "-C", str(REPOSITORY)]
    name = subprocess.run([*git, "rev-parse", "--short=8", commit], check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", folder, commit], check=True)
        try:
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
            command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--config", f"preset={preset}"]
            subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, check=True)
            after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
            runs = pq.read_metadata(Path(folder, "results", preset, "tables/runs.parquet")).num_rows
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", folder], check=True)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "device": processor(), "preset": preset, "cores": cores}
    row |= {"commit": name.stdout.strip(), "runs": runs, "cpu_seconds": round(cpu), "wall_seconds": round(wall)}
    return row


def main() -> None:
    """Measure the commits and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", help="the name of a preset")
    parser.add_argument("commits", nargs="+", help="the commits to compare")
    parser.add_argument("--cores", type=int, default=2, help="the cores that Snakemake may use")
    given = parser.parse_args()
    for commit in given.commits:
        row = measure(given.preset, commit, given.cores)
        print(row)
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
