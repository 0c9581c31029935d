"""The command line `lora-advice`; a command imports what it needs when it runs, so that the help appears at once."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from lora_advice import formats
from lora_advice.errors import UserError
from lora_advice.files import write_text

Model = Annotated[str, Argument(metavar="MODEL", help="A folder, a model's name, or a base of the suite.")]
AnyModel = Annotated[
    str | None, Argument(metavar="[MODEL]", help="A folder, a model's name, a base of the suite, or nothing but sizes.")
]
Hub = Annotated[bool, Option("--hub", help="Look the model up on the hub if it is not known here.")]
Width = Annotated[int | None, Option(min=2, max=10**9, help="The model's hidden size, with its parameters and family.")]
Params = Annotated[float | None, Option(min=1, max=1e15, help="The model's number of parameters, such as 8e9.")]
Family = Annotated[str | None, Option(help="The model's family, such as llama or qwen3.")]
Tokens = Annotated[int | None, Option(min=1, help="Scored tokens of the training data, which are the assistant's.")]
Form = Annotated[
    str | None, Option("--format", help="The columns that hold an example, if the file's allow more than one form.")
]
BatchSize = Annotated[int | None, Option(min=1, help="Examples per step, in place of the recommended number.")]
Steps = Annotated[int | None, Option(min=1, help="Number of steps, in place of those of an epoch.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Variant = Annotated[str, Option(help="LoRA's variant: lora, rslora, lora_plus, dora, pissa, olora or qlora.")]


class _OneSentence(TyperGroup):
    """A group of commands, each of which fails in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the user gave."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            for sentence in str(error).split("\n"):
                # A name may have any length, and what a terminal would obey.
                print(f"{ctx.info_name}: {formats.printable(sentence[:2_000])}", file=sys.stderr)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_OneSentence,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Say what is wrong in LoRA configurations and adapters, and recommend settings, without a run.",
)


@app.command()
def audit(
    paths: Annotated[list[str], Argument(metavar="PATH...", help="Configurations, scripts, adapters, or folders.")],
    file_format: Annotated[
        str | None, Option("--format", help="Read the files as this format, such as axolotl, in place of detecting it.")
    ] = None,
    show_all: Annotated[bool, Option("--all", help="Show all notes and all runs, also where there are many.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON; docs/audit.schema.json describes it.")] = False,
    sarif: Annotated[Path | None, Option(help="Write the findings to this file too, as SARIF for code hosts.")] = None,
    hub: Annotated[bool, Option("--hub", help="Look models up on the hub that are not known here.")] = False,
    skip_unknown: Annotated[
        bool, Option("--skip-unknown", help="Pass over named files that state no training run of a known format.")
    ] = False,
    task: Annotated[str | None, Option(help="The task of runs whose file does not say it: sft or rl.")] = None,
) -> None:
    """Say what is wrong in the configurations of other trainers, from the files alone.

    Exits with status 1 if a finding is an error, and with 2 if a file or folder that was named could not be read.
    """
    from lora_advice.audit import audit as audit_paths

    report = audit_paths(*paths, file_format=file_format, hub=hub, skip_unknown=skip_unknown, task=cast(Any, task))
    if sarif is not None:
        write_text(json.dumps(report.sarif(), indent=2) + "\n", sarif)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal's encoding may lack letters of names
        sys.stdout.reconfigure(errors="backslashreplace")
    if as_json:
        print(json.dumps(asdict(report), indent=2, allow_nan=False))
    else:
        for line in report.lines(show_all):
            print(line)
    named = {Path(path).as_posix() for path in paths}
    if any(missing.path in named for missing in report.not_read):
        raise typer.Exit(2)
    if report.counts["error"]:
        raise typer.Exit(1)


@app.command()
def check(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="The folder of an adapter that PEFT has saved.")],
    as_json: AsJson = False,
) -> None:
    """Say what an adapter's files say, without its base model.

    Exits with status 1 if something is found that is an error.
    """
    from lora_advice.check import plain, read_adapter

    described = read_adapter(adapter)
    if as_json:
        print(json.dumps(asdict(described), indent=2))
    else:
        by_kind = defaultdict(list)
        for module in described.modules:
            by_kind[plain(module.module).rpartition(".")[2]].append(module)
        rows = []
        for kind, modules in sorted(by_kind.items()):
            names = ("rank", "effective_rank", "norm")
            medians = [median(getattr(module, name) for module in modules) for name in names]
            rows.append((kind, str(len(modules)), *map(formats.number, medians)))
        kind = "rsLoRA" if described.rslora else "DoRA" if described.dora else "LoRA"
        title = f"{described.folder}: {kind} of {described.base_model}, rank {described.rank}, "
        title += f"alpha {described.alpha:g}, scale {described.scale:g}, {len(described.modules)} modules with "
        title += f"{described.parameters:,} parameters in {', '.join(described.dtypes)}"
        columns = ("modules", "number", "rank", "effective rank", "norm of the update")
        formats.print_table(columns, rows, columns[2:], title, ["medians; the update is scale B A"])
        for finding in described.findings:
            print(f"{finding.level} {finding.code}: {finding.message}")
        if not described.findings:
            print("nothing was found that is wrong")
    if any(finding.level == "error" for finding in described.findings):
        raise typer.Exit(1)


@app.command()
def card(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="The folder of an adapter that PEFT has saved.")],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the whole card, in place of one part.")] = False,
) -> None:
    """Write into an adapter's model card how it was trained, its best learning rates, and what the audit says.

    Of a README.md that is there, all but the part between the command's own two lines stays as it is.
    """
    from lora_advice.card import write_card

    print(f"{write_card(adapter, overwrite)} is written")


@app.command()
def recommend(
    model: AnyModel = None,
    dataset_tokens: Tokens = None,
    data: Annotated[str | None, Option(help="The training data, a .jsonl or .json file.")] = None,
    data_format: Form = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    results: Annotated[
        Path, Option(help="The folder of your own finished presets, whose learning rates count too.")
    ] = Path("results"),
    width: Width = None,
    params: Params = None,
    family: Family = None,
    hub: Hub = False,
    as_json: AsJson = False,
) -> None:
    """Recommend learning rates with their interval, rank and placement for a model, each with its source."""
    from lora_advice import models, recommend
    from lora_advice.data import read_data

    described = models.find_model(model, hub, width, params, family)
    examined = None if data is None else read_data(Path(data), data_format)
    tokens, examples = (examined.tokens, examined.usable) if examined else (dataset_tokens, None)
    recommendation = recommend.recommend(described, tokens, examples, batch_size, steps, results)
    if as_json:
        print(json.dumps(asdict(recommendation), indent=2, allow_nan=False))
        return
    about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in recommendation.model.items())
    print(f"{about}\n{examined}" if examined else about)
    recommend.recommendation_table(recommendation)


@app.command()
def convert(
    model: AnyModel = None,
    lr: Annotated[
        float | None, Option(help="The learning rate that is known to be good; by default LoRA's recommended one.")
    ] = None,
    from_alpha: Annotated[float | None, Option(help="The alpha of --lr; what is not said of it is as here.")] = None,
    from_rank: Annotated[int | None, Option(min=1, help="The rank of --lr.")] = None,
    from_steps: Annotated[int | None, Option(min=1, help="The number of steps of --lr.")] = None,
    from_batch_size: Annotated[int | None, Option(min=1, help="The examples per step of --lr.")] = None,
    from_variant: Variant = "lora",
    alpha: Annotated[float, Option(help="The alpha here.")] = 32.0,
    rank: Annotated[int | None, Option(min=1, help="The rank here.")] = None,
    steps: Annotated[int | None, Option(min=1, help="The number of steps here.")] = None,
    batch_size: BatchSize = None,
    variant: Variant = "lora",
    width: Width = None,
    params: Params = None,
    family: Family = None,
    hub: Hub = False,
    as_json: AsJson = False,
) -> None:
    """Convert a learning rate of LoRA to another alpha, rank, length, batch size or variant."""
    from lora_advice import models, recommend, variants

    _check_positive(("--lr", lr), ("--from-alpha", from_alpha), ("--alpha", alpha))
    here = recommend.LoraRun(variants.checked_variant(from_variant), from_alpha, from_rank, from_steps, from_batch_size)
    if lr is None and here != recommend.LoraRun():
        raise UserError("--from-alpha, --from-rank, --from-steps, --from-batch-size and --from-variant need --lr")
    there = recommend.LoraRun(variants.checked_variant(variant), alpha, rank, steps, batch_size)
    setting = recommend.convert(models.find_model(model, hub, width, params, family), lr, here, there)
    shown = f"{setting.what}: {recommend.lr_text(setting)}\n{setting.source}"
    print(json.dumps(asdict(setting), indent=2) if as_json else shown)


@app.command()
def trainer(
    name: Annotated[str, Argument(metavar="TRAINER", help="trl, axolotl, llamafactory, or verl (RL).")],
    model: Model,
    data: Annotated[
        str | None, Option(help="The training data: a .jsonl or .json file, or a dataset's id on the hub.")
    ] = None,
    data_format: Form = None,
    dataset_tokens: Tokens = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    lr: Annotated[
        float | None, Option(help="A learning rate in place of the recommended one, such as `convert` gives.")
    ] = None,
    rank: Annotated[int | None, Option(min=1, help="The rank of --lr.")] = None,
    alpha: Annotated[float | None, Option(help="The alpha of --lr.")] = None,
    full: Annotated[bool, Option("--full", help="Full fine-tuning, in place of LoRA.")] = False,
    out: Annotated[Path | None, Option(help="The folder; finetune-TRAINER by default.")] = None,
    hub: Hub = False,
) -> None:
    """Write a folder to train from with the recommended settings, each with its reason."""
    from lora_advice import models, recommend, trainer_files
    from lora_advice.data import read_data

    _check_positive(("--lr", lr), ("--alpha", alpha))
    on_hub = data is not None and models.HUB_ID.fullmatch(data) and not Path(data).is_file()
    examined = None if data is None or on_hub else read_data(Path(data), data_format)
    described = models.find_model(model, hub)
    choices = trainer_files.Choices(lr, rank, alpha, steps, full, data_format if on_hub else None)
    tokens, examples = (examined.tokens, examined.usable) if examined else (dataset_tokens, None)
    recommendation = recommend.recommend(described, tokens, examples, batch_size, steps)
    folder = out or Path(f"finetune-{name}")
    command = trainer_files.write_folder(name, folder, described, recommendation, examined or data or "", choices)
    print(f"{folder} is written; start with: {command}")


def _check_positive(*values: tuple[str, float | None]) -> None:
    for name, value in values:
        if value is not None and not value > 0:
            raise UserError(f"{name} {value:g}: must be above 0")


def run(args: Sequence[str] | None = None, name: str = "lora-advice") -> None:
    """Run a command and exit; `lorabench` passes the words that it was given, and its own name."""
    app(args, prog_name=name)


if __name__ == "__main__":
    run()
