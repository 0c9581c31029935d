"""The commands `recommend`, `convert` and `trainer`: settings to start from, and a folder with them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from lora_advice.errors import UserError

Model = Annotated[str, Argument(metavar="MODEL", help="A folder, a model's id on the hub, or a base of the suite.")]
Tokens = Annotated[int | None, Option(min=1, help="Scored tokens of the training data, which are the assistant's.")]
Data = Annotated[str | None, Option(help="The training data, a .jsonl, .json or .csv file.")]
Form = Annotated[
    str | None, Option("--format", help="The columns that hold an example, if the file's allow more than one form.")
]
BatchSize = Annotated[int | None, Option(min=1, help="Examples per step, in place of the recommended number.")]
Steps = Annotated[int | None, Option(min=1, help="Number of steps, in place of those of an epoch.")]
Results = Annotated[Path, Option(help="The folder of your own finished presets, whose learning rates count too.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Variant = Annotated[str, Option(help="LoRA's variant: lora, rslora, lora_plus, dora, pissa, olora or qlora.")]


def recommend(
    model: Model,
    dataset_tokens: Tokens = None,
    data: Data = None,
    data_format: Form = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> None:
    """Recommend learning rates with their interval, rank and placement for a model, each with its source."""
    from lora_advice import recommend as advice
    from lora_advice.data import read_data
    from lora_advice.user_model import find_model

    described = find_model(model)
    examined = None if data is None else read_data(Path(data), data_format)
    tokens, examples = (examined.tokens, examined.usable) if examined else (dataset_tokens, None)
    recommendation = advice.recommend(described, tokens, examples, batch_size, steps, results)
    if as_json:
        print(json.dumps(asdict(recommendation), indent=2, allow_nan=False))
        return
    about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in recommendation.model.items())
    print(f"{about}\n{examined}" if examined else about)
    advice.recommendation_table(recommendation)


def convert(
    model: Model,
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
    as_json: AsJson = False,
) -> None:
    """Convert a learning rate of LoRA to another alpha, rank, length, batch size or variant."""
    from lora_advice import recommend as advice
    from lora_advice.user_model import find_model
    from lora_advice.variants import checked_variant

    _check_positive(("--lr", lr), ("--from-alpha", from_alpha), ("--alpha", alpha))
    here = advice.LoraRun(checked_variant(from_variant), from_alpha, from_rank, from_steps, from_batch_size)
    if lr is None and here != advice.LoraRun():
        raise UserError("--from-alpha, --from-rank, --from-steps, --from-batch-size and --from-variant need --lr")
    there = advice.LoraRun(checked_variant(variant), alpha, rank, steps, batch_size)
    setting = advice.convert(find_model(model), lr, here, there)
    shown = f"{setting.what}: {advice.lr_text(setting)}\n{setting.source}"
    print(json.dumps(asdict(setting), indent=2) if as_json else shown)


def trainer(
    name: Annotated[str, Argument(metavar="TRAINER", help="trl, axolotl, llamafactory, torchtune, or verl (RL).")],
    model: Model,
    data: Annotated[
        str | None, Option(help="The training data: a .jsonl, .json or .csv file, or a dataset's id on the hub.")
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
    grader: Annotated[
        str | None,
        Option(help="Of problems in RL: `number` grades a response by its last number, `boxed` by \\boxed{}."),
    ] = None,
    full: Annotated[bool, Option("--full", help="Full fine-tuning, in place of LoRA.")] = False,
    out: Annotated[Path | None, Option(help="The folder; finetune-TRAINER by default.")] = None,
) -> None:
    """Write a folder to train from with the recommended settings, each with its reason."""
    from lora_advice import recommend as advice
    from lora_advice.data import read_data
    from lora_advice.models import HUB_ID
    from lora_advice.trainer_files import Choices, write_folder
    from lora_advice.user_model import find_model

    _check_positive(("--lr", lr), ("--alpha", alpha))
    on_hub = data is not None and HUB_ID.fullmatch(data) and not Path(data).is_file()
    examined = None if data is None or on_hub else read_data(Path(data), data_format)
    described = find_model(model)
    choices = Choices(lr, rank, alpha, steps, full, grader, data_format if on_hub else None)
    tokens, examples = (examined.tokens, examined.usable) if examined and not grader else (dataset_tokens, None)
    recommendation = advice.recommend(described, tokens, examples, batch_size, steps)
    folder = out or Path(f"finetune-{name}")
    command = write_folder(name, folder, described, recommendation, examined or data or "", choices)
    print(f"{folder} is written; start with: {command}")


def _check_positive(*values: tuple[str, float | None]) -> None:
    for name, value in values:
        if value is not None and not value > 0:
            raise UserError(f"{name} {value:g}: must be above 0")
