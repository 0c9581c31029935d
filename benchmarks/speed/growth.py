"""How the CPU seconds of planning, counting, judging and reporting grow with the number of runs.

    python -m benchmarks.speed.growth           # a quarter of an hour of CPU time; writes growth.csv
    python -m benchmarks.speed.growth 100 200   # other numbers of runs, printed only

The preset has short sweeps of one model and dataset. Verdicts and the page are made of made-up tables, of two scenes of
the calibration for each of as many datasets as it takes. The exponent is that of the growth from the size before.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import yaml

from benchmarks.calibration.run import Making, Task
from benchmarks.speed import table
from benchmarks.speed.sweep import children_seconds
from lorabench.figures.catalog import figures_of_preset
from lorabench.planning.plan import make_plan
from lorabench.store.io import with_all_columns, write_frame
from lorabench.store.layout import Layout
from lorabench.utils.gpus import processor

RESULTS = Path(__file__).parents[1] / "growth.csv"
SIZES = (1250, 2500, 5000, 10_000)
_PRESET = Path("grow.yaml")


def write_preset(runs: int) -> None:
    """Write a preset of so many runs: sweeps of two learning rates, with many lengths."""
    block = {"models": ["tiny"], "datasets": ["instruct"], "ranks": {"all": [4]}, "seeds": 1}
    block |= {"batch_sizes": list(range(1, 26)), "alphas": [1 + number / 100 for number in range(runs // 50)]}
    preset = {
        "description": "Many short sweeps",
        "datasets": {"instruct": {"kind": "instruct", "train": 400, "validation": 16, "test": 32, "max_chars": 240}},
        "experiments": {"rank": [block | {"lrs": {"fullft": [], "lora": [1e-3, 3e-3]}}]},
        "margins": {"loss": 0.02, "reward": 0.1, "lr_factor": 1.6},
        "execution": {"gflops": 60.0},
    }
    _PRESET.write_text(yaml.safe_dump(preset))


def write_tables(runs: int, out: Path) -> None:
    """Write the tables of so many made-up runs, and of some more until the last scene is whole."""
    made: dict[str, list[pd.DataFrame]] = {"runs": [], "curves": [], "test_losses": []}
    while sum(map(len, made["runs"])) < runs:
        number, names = len(made["runs"]), {"dataset": f"worked-{len(made['runs']) // 2}"}
        # Of the first worlds no loss is below 0, which no table may have.
        world = Making().tables(Task(("ranks", "placements")[number % 2], 0.0, 0, 2), number % 16)
        for name, frames in made.items():
            frame: pd.DataFrame = getattr(world, name)
            # Worlds count their runs and the groups of their test examples, whose names tables have as text.
            names["run_id"] = frame["run_id"] + f"-{number}"
            frames.append(frame.assign(**names).drop(columns="group", errors="ignore"))
    for name, frames in made.items():
        write_frame(with_all_columns(pd.concat(frames), name), name, out)


def cpu_seconds(*arguments: str | Path) -> float:
    """Run lorabench with one thread and return the CPU seconds of it and its processes."""
    command, before = [Path(sys.executable).parent / "lorabench", *arguments], children_seconds()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return children_seconds() - before


def planned(runs: int) -> Iterator[tuple[str, float]]:
    """Yield each part that needs no tables, with its CPU seconds for so many runs."""
    layout, times = Layout.of(str(_PRESET)), [time.process_time()]
    for _ in range(3):
        plan = make_plan(layout.preset)
        assert len(plan.jobs) < len(plan.sweeps)
        times.append(time.process_time())
    yield "grouping", min(end - start for start, end in pairwise(times))
    for run in (run for sweep in plan.sweeps for run in sweep.grid()):
        (layout.runs / run.run_id).mkdir(parents=True)
    for name in ("plan", "status"):
        yield name, cpu_seconds(name, "--preset", _PRESET)
    yield "snakemake -n", cpu_seconds("run", _PRESET, "-n", "--quiet")


def judged(runs: int) -> Iterator[tuple[str, float]]:
    """Yield each part that reads tables, with its CPU seconds for so many runs."""
    layout = Layout.of(str(_PRESET))
    tables = layout.tables()
    write_tables(runs, tables)
    layout.figures.mkdir(parents=True)
    for figure in figures_of_preset(layout.preset):
        for kind in ("svg", "csv"):
            (layout.figures / f"{figure.name}.{kind}").touch()
    yield "claims", cpu_seconds("claims", "--preset", _PRESET, "--tables", tables, "--out", tables)
    yield "report", cpu_seconds("step", "report", "--preset", _PRESET)


def main() -> None:
    """Measure all sizes, and print and write the table; other sizes may be given, whose table is not written."""
    facts, rows, before = table.facts(os.getloadavg()[0], 1, processor()), [], {}
    sizes = tuple(map(int, sys.argv[1:])) or SIZES
    for parts, runs in product((planned, judged), sizes):
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            write_preset(runs)
            for part, seconds in parts(runs):
                less, shorter = before.get(part, (math.nan, math.nan))
                exponent = round(math.log(seconds / shorter) / math.log(runs / less), 2)
                rows.append({**facts, "part": part, "runs": runs, "cpu_seconds": seconds, "exponent": exponent})
                table.say(f"{part:12} {runs:6} {seconds:8.2f} {exponent:5}")
                before[part] = runs, seconds
    if sizes == SIZES:
        pd.DataFrame(rows).round(3).to_csv(RESULTS, index=False)


if __name__ == "__main__":
    main()
