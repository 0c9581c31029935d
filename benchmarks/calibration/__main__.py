"""`python -m benchmarks.calibration`: calibrate the verdicts on made-up worlds."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

# The matrices of a fit are small, and the processes share the cores. Thread pools read this once, on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# So few draws move the end of an interval by about 4% of its error, to either side.
os.environ.setdefault("LORABENCH_DRAWS", "4096")

import pandas as pd

from benchmarks.calibration.intervals import KINDS, interval_shares
from benchmarks.calibration.noise import NoiseLevels, measure_noise
from benchmarks.calibration.power import power_of_plan
from benchmarks.calibration.run import Making, counted, shares, twins
from benchmarks.calibration.traits import NAMES, Traits
from lorabench.cli.common import in_one_sentence, plan_and_layout
from lorabench.planning.plan import make_plan
from lorabench.store.io import write_csv
from lorabench.store.tables import Tables


def main() -> None:
    """Show how often verdicts are wrong: judge made-up sweeps whose truth is known, and count the verdicts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=main.__doc__)
    add = parser.add_argument
    add("--worlds", type=int, default=500, help="worlds for each claim and size of the effect (500)")
    add("--claims", nargs="+", default=[], metavar="ID", help="ids of claims, by default all that are covered")
    add("--processes", type=int, default=2, help="number of processes (2)")
    add("--seed", type=int, default=0, help="seed of all random numbers (0)")
    add("--trait", nargs="+", choices=(*NAMES, "plain"), help="break these assumptions alone (all); plain: break none")
    add("--intervals", nargs="*", choices=KINDS, help="count only how often intervals hold the truth, by kind of world")
    add("--out", type=Path, help="CSV file for the table")
    add("--again", type=Path, help="CSV file for how often the verdict falls again in a twin of a world")
    add("--measure", type=Path, help="only measure the noise of the runs in this folder of tidy tables")
    add("--dataset", nargs="+", default=[], help="datasets to measure the noise of, by default all")
    add("--preset", help="count only the power of this preset's sweeps, with their own LRs and seeds")
    add("--no-racing", action="store_true", help="with --preset: seeds do not race")
    add("--noise", type=Path, help="tidy tables to measure the noise from, by default laptop's")
    options = parser.parse_args()
    with in_one_sentence():
        if options.measure is not None:
            measured = asdict(measure_noise(Tables.read(options.measure), options.dataset))
            print(pd.json_normalize(measured).iloc[0].to_string(float_format="{:.4g}".format))
            return
        traits = Traits.only([name for name in options.trait or NAMES if name != "plain"])
        noise = measure_noise(Tables.read(options.noise), options.dataset) if options.noise else NoiseLevels()
        making = Making(noise, traits, options.seed)
        if options.intervals is not None:
            table = interval_shares(options.intervals or KINDS, options.worlds, options.processes, options.seed)
        elif options.preset is not None:
            plan = plan_and_layout(options.preset)[0]
            if options.no_racing:
                plan = make_plan(plan.preset.model_copy(update={"racing": None}))
            table = power_of_plan(plan, options.worlds, options.claims, options.processes, making)
        else:
            counts = counted(options.worlds, options.claims, options.processes, making)
            table = shares(counts)
            if options.again is not None:
                write_csv(twins(counts), options.again)
        if options.out is None:
            print(table.drop(columns="what", errors="ignore").to_string(index=False, float_format="{:.3f}".format))
        else:
            write_csv(table, options.out)


if __name__ == "__main__":
    main()
