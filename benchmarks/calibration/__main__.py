"""`python -m benchmarks.calibration`: calibrate the verdicts on made-up worlds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lorabench.cli.common import in_one_sentence, plan_and_layout

app = typer.Typer()


@app.command()
def calibrate(
    worlds: Annotated[int, typer.Option(min=1, help="Worlds for each claim and size of the effect.")] = 500,
    claims: Annotated[
        list[str] | None, typer.Option(help="Ids of claims, by default all that are covered.", metavar="ID...")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Make worlds that break no assumption of the fit.")] = False,
    trait: Annotated[
        list[str] | None,
        typer.Option(help="Make worlds that break this assumption alone, by default all.", metavar="NAME..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="CSV file for the table; the command goes on where it was interrupted.")
    ] = None,
    again: Annotated[
        Path | None, typer.Option(help="CSV file for how often the verdict falls again in a twin of a world.")
    ] = None,
    measure: Annotated[
        Path | None, typer.Option(help="Only measure the noise of the runs in this folder of tidy tables.")
    ] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Dataset to measure, by default all.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Count only the power of this preset's sweeps, with their own LRs and seeds.")
    ] = None,
    racing: Annotated[bool, typer.Option(help="With --preset: let seeds race as the preset says.")] = True,
    noise: Annotated[
        Path | None, typer.Option(help="With --preset: tidy tables to measure the noise from, by default laptop's.")
    ] = None,
) -> None:
    """Show how often verdicts are wrong: judge made-up sweeps whose truth is known, and count the verdicts."""
    # The matrices of a fit are small, and the processes share the cores. Thread pools read this once, on import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # So few draws move the end of an interval by about 4% of its error, to either side.
    os.environ.setdefault("LORABENCH_DRAWS", "4096")
    with in_one_sentence():
        from dataclasses import asdict, replace

        if measure is not None:
            from benchmarks.calibration.noise import measure_noise
            from lorabench.store.tables import Tables

            for name, value in asdict(measure_noise(Tables.read(measure), dataset or ())).items():
                print(f"{name}: {value:.4g}")
            return
        from benchmarks.calibration.run import Making
        from benchmarks.calibration.traits import NAMES, Traits
        from lorabench.errors import UserError

        if unknown := sorted({*(trait or ())} - {*NAMES}):
            raise UserError(f"no trait {', '.join(unknown)}; allowed: {', '.join(NAMES)}")
        making = Making(traits=Traits.only(trait or ()) if plain or trait else Traits(), seed=seed)
        if preset is not None:
            from benchmarks.calibration import power
            from benchmarks.calibration.noise import measure_noise
            from lorabench.planning.plan import make_plan
            from lorabench.store.io import write_csv
            from lorabench.store.tables import Tables

            if noise is not None:
                making = replace(making, noise=measure_noise(Tables.read(noise), dataset or ()))
            ids = [*(claims or ()), *(more or ())]
            plan = plan_and_layout(preset)[0]
            if not racing:
                plan = make_plan(plan.preset.model_copy(update={"racing": None}))
            table = power.power_of_plan(plan, worlds, ids, processes, making)
            if out is None:
                print(table.drop(columns="what").to_string(index=False, float_format="{:.3f}".format))
            else:
                write_csv(table, out)
            return
        from benchmarks.calibration.run import counted, shares, twins
        from lorabench.store.io import write_csv

        kept = None if out is None else out.with_name(f"{out.name}.partial")
        counts = counted(worlds, [*(claims or ()), *(more or ())], processes, making, kept)
        table = shares(counts)
        if again is not None:
            write_csv(twins(counts), again)
        if out is None:
            print(table.drop(columns="what").to_string(index=False, float_format="{:.3f}".format))
        else:
            write_csv(table, out)
        if kept is not None:
            kept.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
