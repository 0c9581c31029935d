"""The commands for people: plan and run a preset, write one for an own model, merge tables, judge and draw."""

from __future__ import annotations

import gc
import os
import sys
from argparse import ArgumentParser
from importlib.metadata import entry_points, version
from itertools import dropwhile
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from lorabench.cli.common import OneSentence, PresetOption, own_gpus, plan_and_layout
from lorabench.cli.steps import steps
from lorabench.errors import UserError
from lorabench.utils import formats
from lorabench.utils.files import SNAKEFILE, WORKFLOW
from lorabench.utils.gpus import GPUS

app = typer.Typer(
    cls=OneSentence,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help='Rerun the comparisons of "LoRA Without Regret" and judge its claims from the results.',
    epilog="The steps of the workflow, which its rules call: lorabench step --help.",
)
app.add_typer(steps, name="step", hidden=True)

ADVICE = {
    "audit": "Say what is wrong in the configurations of other trainers, from the files alone.",
    "card": "Write into an adapter's model card how it was trained, its best learning rates, and what the audit says.",
    "check": "Say what an adapter's files say, and whether merging and serving keep what it computes.",
    "recommend": "Recommend learning rates with their interval, rank and placement for a model, each with its source.",
    "convert": "Convert a learning rate of LoRA to another alpha, rank, length, batch size or variant.",
    "trainer": "Write a folder to train from with the recommended settings, each with its reason.",
}
"""The commands of the distribution lora-advice, which are offered here too, with their help."""

MOST_LINES = 20
"""The most differences of a file that `verify` prints."""

PresetArgument = Annotated[str, Argument(help="A shipped preset's name or the path of a YAML file.")]
# A command's imports make many objects and little garbage: collecting it less often takes a tenth off each start.
gc.set_threshold(20_000)


@app.callback(invoke_without_command=True)
def main(asked: Annotated[bool, Option("--version", help="Print the version and exit.")] = False) -> None:
    """The options that stand before a command."""
    if asked:
        print(f"lorabench {version('lorabench')}")
        raise typer.Exit


@app.command()
def init(
    out: Annotated[Path, Argument(metavar="MY.YAML", help="The preset to write.")],
    model: Annotated[str, Option(help="A folder, a model's id on the hub, or the shipped base: tiny.")],
    data: Annotated[str, Option(help="A .jsonl, .json, .csv or .parquet file, or a dataset's id on the hub.")],
    data_format: Annotated[str | None, Option("--format", help="The columns of an example, if several fit.")] = None,
    ranks: Annotated[list[int] | None, Option("--rank", help="A LoRA rank in place of the suggested ones.")] = None,
    seeds: Annotated[int, Option(min=1, help="Number of seeds at the best learning rate.")] = 3,
    epochs: Annotated[float, Option(help="Passes over the training data.")] = 1.0,
    held_out: Annotated[float, Option(min=0.01, max=0.4, help="Share for validation, and for the test.")] = 0.1,
    gpu: Annotated[str | None, Option(help="The GPU to train on, such as H100-80GB; without it, a CPU.")] = None,
    grader: Annotated[
        str | None, Option(help="For RL: `number` grades by the last number, `boxed` by \\boxed{}.")
    ] = None,
    variants: Annotated[
        list[str] | None, Option("--variant", help="A variant of LoRA beside it, such as dora.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Overwrite the preset if it exists.")] = False,
) -> None:
    """Write a small preset that asks whether LoRA matches full fine-tuning on your own model and data."""
    from lorabench.cli.show import plan_table
    from lorabench.custom.preset import Choices, init_preset
    from lorabench.planning.plan import make_plan

    choices = Choices(tuple(sorted(set(ranks or ()))), seeds, epochs, held_out, gpu, grader, tuple(variants or ()))
    written = init_preset(out, model, data, data_format, choices, force, say=print)
    plan_table(make_plan(written))
    print(f"wrote {out}; next: lorabench run {out}")


@app.command()
def plan(
    preset: PresetOption = "laptop",
    out: Annotated[Path | None, Option(help="Write the planned runs to this parquet file and print nothing.")] = None,
    gpu: Annotated[str | None, Option(help="Estimate for another GPU, by its name in lorabench/utils/gpus.py.")] = None,
    price: Annotated[float | None, Option(min=0, max=1e6, help="Price of one GPU for an hour.")] = None,
) -> None:
    """Show what a preset will run and what it costs: runs, tokens, FLOPs, time, memory and money per experiment."""
    planned, layout = plan_and_layout(preset)
    if out is not None:
        import pyarrow as pa

        from lorabench.store.io import write_table

        write_table(pa.Table.from_pylist(planned.rows()), out)
        return
    from lorabench.cli.show import measured_speed, plan_table
    from lorabench.planning.plan import make_plan

    if gpu is not None:
        if gpu not in GPUS:
            raise UserError(f"gpu {gpu!r} is not known; allowed: {', '.join(GPUS)}")
        # The preset's speed is that of its own machine.
        planned = make_plan(planned.preset.with_execution(gpu=gpu, gflops=None, gpu_time=1.0))
    speed, measured = measured_speed(planned, layout) or ({}, None)
    if speed:
        planned = make_plan(planned.preset.with_execution(**speed))
    plan_table(planned, price, measured)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    preset: PresetArgument = "laptop",
    batches: Annotated[
        int | None, Option(min=1, max=1000, help="Run so many batches of held-out seeds, and judge them together.")
    ] = None,
) -> None:
    """Run a preset in this folder: start Snakemake on the packaged workflow, and pass all further options on to it."""
    from lorabench.config.loading import preset_path

    preset_path(preset)
    if batches is not None:
        from lorabench.cli.batches import run_batches

        run_batches(preset, batches, _started, context.args)
        return
    command, environment = _started(preset, context.args)
    os.execve(command[0], command, environment)


def _started(preset: str, options: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line that runs a preset, and its environment."""
    # The workflow's rules call `lorabench`, so this environment's commands come first in PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return snakemake_command(preset, options), os.environ | {"PATH": path}


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def decide(
    context: typer.Context,
    ids: Annotated[list[str], Argument(metavar="CLAIM...", help="The ids of claims, such as B2 E1.")],
    preset: PresetOption = "laptop",
    budget: Annotated[str, Option(help="When to stop: a time such as 30m, 2h or 1d.")] = "1h",
) -> None:
    """Run what claims need, batch after batch of held-out seeds, until they are decided or the budget ends.

    All further options are passed on to Snakemake, such as --profile slurm after the claims.
    """
    from lorabench.cli.batches import decide as decide_claims

    options = [*dropwhile(lambda word: not word.startswith("-"), ids), *context.args]
    decide_claims(preset, ids[: len(ids) + len(context.args) - len(options)], budget, _started, options)


def snakemake_command(preset: str, options: list[str]) -> list[str]:
    """Return the command line that runs a preset with the packaged workflow, and options and targets for Snakemake.

    Without a number of cores, all cores are used. A shipped profile may be given by its name (`--profile slurm`),
    unless the current folder has a profile of that name.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--profile")
    parser.add_argument("--config", "-C", nargs="*", action="extend", default=[])
    known, parts = parser.parse_known_args(options)
    if known.profile is not None:
        shipped = WORKFLOW / "profiles" / known.profile
        parts += ["--profile", str(shipped) if shipped.is_dir() and not Path(known.profile).exists() else known.profile]
    if not any(part.startswith(("--cores", "-c", "--jobs", "-j")) for part in parts):
        parts += ["--cores", "all"]
    # Snakemake takes the last --config only, and all words that follow it.
    parts += ["--config", f"preset={preset}", *known.config]
    return [sys.executable, "-P", "-m", "snakemake", "--snakefile", str(SNAKEFILE), *parts]


@app.command()
def status(preset: PresetOption = "laptop") -> None:
    """Show how far the work of a preset is and what is running."""
    from lorabench.store.progress import finished_runs, runs_at_work

    planned, layout = plan_and_layout(preset)
    done, expected, jobs_done = finished_runs(planned, layout)
    print(f"{done}/{expected} runs ({done / max(1, expected):.0%}), {jobs_done}/{len(planned.jobs)} jobs done")
    for job in runs_at_work(planned, layout):
        # A job that was killed counts as at work until it is started again; its silence tells.
        silence = f"; last sign of life {job['age_s'] / 60:.0f} minutes ago" if job["age_s"] >= 60 else ""
        print(
            f"  {job['label']}: run {job['run']}/{job['runs']}, "
            f"lr {job['lr']:g}, seed {job['seed']}, step {job['step']}/{job['steps']}{silence}"
        )
    if layout.report.exists():
        print(f"  report: {layout.report}")


@app.command()
def doctor(
    preset: PresetOption = "laptop",
    tests: Annotated[bool, Option("--gpu-tests", help="Run the repository's tests of a GPU instead.")] = False,
) -> None:
    """Check this machine for a preset in some minutes: the numbers, the memory and the speed of a training step.

    Writes results/doctor/<device>.json, from which `lorabench plan` takes the speed, and exits with status 1 if a check
    failed.
    """
    if tests:
        from lorabench.doctor.gpu_tests import gpu_tests

        os.execv(sys.executable, gpu_tests())
    planned, layout = plan_and_layout(preset)
    with own_gpus(planned):
        from lorabench.doctor.bench import examine
        from lorabench.doctor.record import write_record

        record = examine(planned, layout, lambda check: print(f"{check.status}: {check.name}", file=sys.stderr))
        path = write_record(record)
    rows = []
    for check in record.checks:
        numbers = ["" if value is None else formats.number(value) for value in (check.value, check.planned)]
        rows.append([check.name, check.status, *numbers, check.unit, check.sentence])
    formats.print_table(("check", "result", "measured", "planned", "unit", ""), rows, ("measured", "planned"))
    print(f"{record.device}, {record.seconds:.0f} s; written to {path}")
    if record.failed:
        print(f"lorabench: {len(record.failed)} of {len(record.checks)} checks failed", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def claims(
    tables: Annotated[list[Path], Option(help="Folder with the tidy tables; several are merged.")],
    out: Annotated[Path, Option(help="Folder for the claims table.")],
    preset: Annotated[str | None, Option(help="The preset of the runs, which states the margins.")] = None,
    margins: Annotated[Path | None, Option(help="A YAML file with the margins, for runs without a preset.")] = None,
    noise: Annotated[
        Path | None, Option(help="Folder of tables whose seed noise holds where there is one seed.")
    ] = None,
) -> None:
    """Judge the paper's claims from tidy tables.

    Runs on held-out seeds of a preset that is named without a first seed are judged batch after batch.
    """
    from lorabench.analysis.optima import pooled_noise
    from lorabench.claims.batches import SEEDS
    from lorabench.config.loading import load_preset, read_margins
    from lorabench.report.judged import write_claims
    from lorabench.store.tables import Tables

    if preset is not None and margins is not None:
        raise UserError("--preset and --margins: give one of them, since the preset states margins too")
    predictions, chosen = None, None if margins is None else read_margins(margins)
    if preset is not None:
        stated = load_preset(preset)
        chosen, predictions = stated.margins, stated.predictions or {}
    elsewhere = None if noise is None else pooled_noise(Tables.read(noise).runs, str(noise))
    read = Tables.read(*tables)
    if preset is not None and not stated.first_seed and "seed" in read.runs and read.runs["seed"].ge(SEEDS).any():
        from lorabench.report.batches import judge_registered

        if elsewhere is not None:
            raise UserError("--noise: batches have several seeds each; allowed: tables of one seed, without batches")
        judged, _ = judge_registered(preset, read, out)
    else:
        judged = write_claims(tables, out, chosen, predictions, elsewhere)
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in judged["verdict"].value_counts().items())
    print(f"{len(judged)} claims: {verdicts}; written to {out / 'claims.csv'}")
    untested = judged.loc[judged["verdict"].eq("not tested"), "reason"].value_counts()
    for reason, count in untested.items():
        if str(reason).startswith("the runs table"):
            print(f"{count} of them not tested: {reason}")


@app.command()
def figure(
    name: str,
    tables: Annotated[list[Path], Option(help="Folder with tidy tables; several are merged.")],
    out: Annotated[Path, Option(help="Folder for SVG, PNG and CSV.")],
) -> None:
    """Draw one figure from tidy tables; the name `all` draws every figure that the tables hold data for."""
    from lorabench.figures.catalog import save_all_figures, save_figure

    if name != "all":
        save_figure(name, tables, out)
        return
    for sentence in save_all_figures(tables, out):
        print(sentence)


@app.command()
def merge(folders: list[Path], out: Annotated[Path, Option(help="Folder of the merged tables.")]) -> None:
    """Merge the tidy tables of several machines; if they contradict each other, name the row and write nothing."""
    from lorabench.store.tables import merge as merge_folders

    merge_folders(folders, out)


@app.command("import")
def import_runs(
    place: Annotated[Path, Argument(help="A folder of runs, or a CSV file of W&B.")],
    out: Annotated[Path, Option(help="Folder for the tidy tables.")],
    kind: Annotated[
        str, Option("--from", help="Its kind: source (with a source.yaml), trainer-state, wandb-csv or tensorboard.")
    ] = "source",
    said: Annotated[
        list[str] | None, Option("--set", metavar="[RUN:]KEY=VALUE", help="What the runs do not say themselves.")
    ] = None,
) -> None:
    """Read runs of others into tidy tables: logs of their trainers, or published tables with a file source.yaml.

    From trainer-state, these are folders of transformers and TRL; from wandb-csv, exports of a table of runs, of charts
    or of histories; from tensorboard, event files. What such logs do not say is asked for, all at once.
    """
    from lorabench.sources.logs import tidy_tables
    from lorabench.sources.source import import_source
    from lorabench.sources.trackers import READERS
    from lorabench.store.io import write_frame

    if kind == "source":
        tables, notes = import_source(place)[1], list[str]()
    elif kind in READERS:
        tables, notes = tidy_tables(READERS[kind](place), said or (), place)
    else:
        raise UserError(f"--from {kind!r}: allowed: source, {', '.join(READERS)}")
    # Of the documented columns, those that the runs have are written.
    write_frame(tables.runs, "runs", out, all_columns=False)
    write_frame(tables.curves, "curves", out, all_columns=False)
    print(f"{place}: {len(tables.runs)} runs and {len(tables.curves)} points of curves")
    for note in notes:
        print(note)


@app.command()
def verify(
    folder: Annotated[Path, Argument(help="The results of a preset, such as results/laptop, or a folder of tables.")],
    preset: Annotated[str | None, Option(help="The preset, if the folder's name is not that of a shipped one.")] = None,
) -> None:
    """Make tables, claims, figures and page again from the runs, and name every number that differs.

    Exits with status 1 if one does.
    """
    from lorabench.report.verify import verify as compared_files

    differing = 0
    for compared in compared_files(folder, preset, lambda step: print(f"{step} ...", file=sys.stderr)):
        lines = compared.differences or [compared.seen]
        more = [f"{len(lines) - MOST_LINES} further differences"] if len(lines) > MOST_LINES else []
        for line in [*lines[:MOST_LINES], *more]:
            print(f"{compared.name}: {formats.printable(line)}")
        differing += bool(compared.differences)
    if differing:
        print(f"lorabench: {differing} files or folders differ", file=sys.stderr)
        raise typer.Exit(1)
    print("nothing differs")


@app.command()
def evidence(
    out: Annotated[Path, Option(help="Folder for the tables and figures.")] = Path("results/evidence"),
    source: Annotated[
        list[Path] | None, Option(help="An own source, or a folder of sources, beyond the shipped.")
    ] = None,
    tables: Annotated[list[Path] | None, Option(help="Folder with the table claims of an own preset.")] = None,
) -> None:
    """Judge all published runs by the paper's claims.

    Writes the verdicts, those on core claims by scale with a picture, the forest plot, and the known optimal learning
    rates.
    """
    from lorabench.figures.evidence import evidence_tables, write_evidence
    from lorabench.sources.measurements import read_own
    from lorabench.store.published import evidence_folders

    folders = evidence_folders(Path())
    own = {folder.name: read_own(folder, folder.name) for folder in folders}
    for folder in tables or []:
        # A finished preset stands for what was published of it.
        name = folder.parent.name if folder.name == "tables" else folder.name
        own[name] = read_own(folder, name)
    gathered = evidence_tables(source or (), list(own.values()), folders)
    write_evidence(gathered, out)
    models = len(gathered["claims"].drop_duplicates(["source", "model"]))
    print(f"{models} models of public sources judged; their answers are in {out / 'matrix.svg'}")


@app.command()
def freeze(
    preset: PresetArgument,
    unexplored: Annotated[bool, Option("--unexplored", help="The preset was never run in this design.")] = False,
    redesigned: Annotated[bool, Option("--redesigned", help="Published verdicts are of an earlier design.")] = False,
    power: Annotated[Path | None, Option(help="A CSV file of python -m benchmarks.calibration.")] = None,
) -> None:
    """Fix rules, seeds, data and expected verdicts of a preset before it is run on held-out seeds.

    The first of these seeds is 100, or SEED of `<preset>@SEED`. Writes workflow/frozen/<preset>.yaml, and of a further
    batch of seeds <preset>@SEED.yaml, which expects what the batch before does.
    """
    import pandas as pd

    from lorabench.claims.batches import SEEDS
    from lorabench.config.loading import split_name
    from lorabench.report import freeze as freezing
    from lorabench.store.io import read_claims, table_path
    from lorabench.store.layout import Layout
    from lorabench.store.published import NOT_PUBLISHED

    name, first_seed = split_name(preset)
    explored, seeded = Layout.of(name), f"{name}@100" if first_seed is None else preset
    if power is not None and not power.is_file():
        raise UserError(f"--power {power}: there is no such file")
    path, batch = freezing.frozen_path(seeded), (first_seed or 0) // SEEDS
    if batch > 1 and freezing.is_registered(f"{name}@{(batch - 1) * SEEDS}"):
        freezing.register(name, seeded)
        print(f"batch {batch} is registered in {path}; commit it, then run: lorabench run {seeded}")
        return
    places = (explored.tables(), explored.published)
    claims = next((folder for folder in places if table_path(folder, "claims")), None)
    if unexplored and claims is not None and not (claims == explored.published and redesigned):
        raise UserError(
            f"--unexplored: the preset {explored.name} has verdicts in {claims}; if they are published and of an "
            "earlier design of it, say --redesigned too"
        )
    if not unexplored and claims is None:
        raise UserError(
            f"there are no verdicts of the preset {explored.name} in {' or '.join(map(str, places))}: run it first, "
            "or say --unexplored if it was never run"
        )
    judged = None if unexplored or claims is None else read_claims(claims, without=NOT_PUBLISHED)
    freezing.write_frozen(freezing.freeze(seeded, judged, None if power is None else pd.read_csv(power)), path)
    print(f"wrote {path}; commit it, then run: lorabench run {seeded}")
    print(f"and at the end: python workflow/scripts/publish.py --held-out {path}")


def _advise(context: typer.Context) -> None:
    name = context.command.name or ""
    commands = entry_points(group="lorabench.commands", name=name)
    if not commands:
        raise UserError(f"`lorabench {name}` needs the package lora-advice: pip install lora-advice")
    [command] = commands
    command.load()([name, *context.args], "lorabench")


# All words are left to the other program, `--help` included.
_UNPARSED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
for _name, _help in ADVICE.items():
    app.command(_name, help=_help, context_settings=_UNPARSED)(_advise)
