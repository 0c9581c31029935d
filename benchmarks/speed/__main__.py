"""The speed of this project, compared with the trainers that users would run otherwise.

    python -m benchmarks.speed              # a quarter of an hour of CPU time
    python -m benchmarks.speed --keep       # also writes the numbers to speed.csv
    python -m benchmarks.speed --quick      # the smallest form, to check that everything works
    python -m benchmarks.speed --arm lorabench --arm trl

- sweep: the wall-clock time of a whole sweep of LoRA's learning rates, start-up included, the median of turns in which
  the arms alternate. The losses of all arms must agree.
- step: a training step within one process, by rank, model, length and precision, as a share of what the machine
  reaches in matmul.
- rl: a step of RL, against TRL's GRPOTrainer.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.speed import rl, steps, sweep, table
from lorabench.utils.gpus import processor


@dataclass(frozen=True)
class Form:
    """The extent of the measurements."""

    sweep: sweep.Shape
    settings: list[steps.Setting]
    repeats: int
    rl: rl.Shape


FULL = Form(sweep.Shape(), steps.SETTINGS, 7, rl.Shape())
QUICK = Form(
    sweep.Shape(lrs=(5e-4, 2e-3), steps=3, batch_size=4, rank=2, test=8, turns=1),
    steps.QUICK,
    1,
    rl.Shape(problems=2, group_size=4, steps=rl.WARM_UP + 4),
)
STEPS = "steps"


def measure(form: Form, arms: list[str]) -> list[table.Row]:
    """Measure the chosen arms and return their rows."""
    rows = sweep.measure(form.sweep, [name for name in sweep.ARMS if name in arms])
    if STEPS in arms:
        rows += steps.measure(form.settings, form.sweep.threads, form.repeats)
    rows += rl.measure(form.rl, [name for name in rl.ARMS if name in arms])
    return table.with_ratios(rows)


def main() -> None:
    """Measure the arms, print the rows and write them if an option says so."""
    every = [*sweep.ARMS, STEPS, *rl.ARMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure the smallest form")
    parser.add_argument("--arm", action="append", choices=every, help="measure only this arm; can be repeated")
    parser.add_argument("--keep", action="store_true", help="write the numbers to speed.csv")
    parser.add_argument("--out", type=Path, help="write the numbers to this CSV")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every arm (2)")
    options = parser.parse_args()
    if options.keep and (options.quick or options.arm):
        parser.error("--keep is for the whole benchmark")
    # The measurements must not use a GPU of the machine.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load = os.getloadavg()[0]
    print(f"load of the machine before: {load:.1f} on {os.cpu_count()} cores")
    form = QUICK if options.quick else FULL
    shape = replace(form.sweep, threads=options.threads)
    form = replace(form, sweep=shape, rl=replace(form.rl, threads=options.threads))
    rows = measure(form, options.arm or every)
    print(table.shown(rows))
    out = table.RESULTS if options.keep else options.out
    if out:
        table.write(rows, table.facts(load, form.sweep.turns, processor()), out)


if __name__ == "__main__":
    main()
