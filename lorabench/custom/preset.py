"""A small preset for your own model and data, written by `lorabench init` as YAML with comments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel

from lorabench.config.experiments import AUTO
from lorabench.config.loading import PRESETS, parse_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.config.models import HubModel, TinyModel
from lorabench.config.preset import Preset
from lorabench.custom import advice
from lorabench.custom.data import UserData, examine
from lorabench.custom.model import UserModel, find_model
from lorabench.custom.user_problems import UserProblems, examine_problems
from lorabench.custom.yaml_text import Inline, Noted, one_line, slug, yaml_text
from lorabench.errors import UserError
from lorabench.planning.expand import starting_lr
from lorabench.utils import formats
from lorabench.utils.files import atomic_path
from lorabench.utils.gpus import GPUS

# Larger validation and test splits reduce the noise of a loss little and cost time at each validation.
_MAX_VALIDATION, _MAX_TEST = 500, 1000
_MIN_EXAMPLES = 10
# The speed of training on one core, measured with the tiny base and with SmolLM2-135M.
_GFLOPS_PER_CORE = 50.0
_MARGINS_NOTE = """The smallest effects that matter, by which verdicts are judged; choose them before the runs.
loss and reward: shares of the gain from the base to full fine-tuning, in loss and in accuracy of RL.
lr_factor: the factor up to which two optimal learning rates count as the same."""


@dataclass(frozen=True)
class Choices:
    """The choices that a user can make in a preset."""

    ranks: tuple[int, ...] = ()
    """The LoRA ranks; empty to take the ranks that the amount of data suggests."""
    seeds: int = 3
    epochs: float = 1.0
    held_out: float = 0.1
    """The share of the examples for validation, and the same share for the test."""
    gpu: str | None = None
    """The GPU to train on; None for a CPU."""
    grader: str | None = None
    """The grader of problems for reinforcement learning; None for supervised fine-tuning."""


@dataclass(frozen=True)
class Splits:
    """The number of examples in each split."""

    train: int
    validation: int
    test: int


def splits(usable: int, share: float) -> Splits:
    """Return the sizes of disjoint splits.

    Args:
        usable: the number of usable examples.
        share: the share of the examples for validation, and the same share for the test.

    Raises:
        UserError: there are too few examples.
    """
    if usable < _MIN_EXAMPLES:
        raise UserError(f"{usable} usable examples are too few; at least {_MIN_EXAMPLES} are needed")
    held_out = max(1, round(usable * share))
    validation, test = min(held_out, _MAX_VALIDATION), min(held_out, _MAX_TEST)
    return Splits(usable - validation - test, validation, test)


def init_preset(
    path: Path, model: str, data: str, form: str | None, choices: Choices, force: bool, say: Callable[[str], None]
) -> Preset:
    """Examine a model and data, and write a preset for them.

    Args:
        path: the .yaml file to write.
        model: the model's name; see `find_model`.
        data: a data file or the id of a dataset of the hub; see `examine_data` and `examine_problems`.
        form: the format of a data file; None to recognize it by the columns.
        choices: the user's choices.
        force: whether to overwrite an existing file.
        say: is called with lines that describe the model, the data and the splits.

    Raises:
        UserError: the model, the data, the choices or the path are wrong.
    """
    _check_place(path, force)
    if form is not None and choices.grader is not None:
        raise UserError("--format and --grader: problems have the columns question and answer; give one of them")
    described = find_model(model)
    say(str(described))
    examples: UserData | UserProblems
    if choices.grader is None:
        examples, template = examine(described, data, form)
    else:
        examples, template = examine_problems(described, data, choices.grader)
    if template:
        say(f"the model has no chat template; the preset gives it one (chat_template: {template})")
    say(str(examples))
    preset = write_preset(path, described, examples, choices, template)
    source = next(iter(preset.sources.values()))
    say(f"split: {source.train} train, {source.validation} validation, {source.test} test")
    for block in preset.experiments.rank or []:
        steps = int(source.train * block.epochs) // block.batch_sizes[0]
        if steps < advice.SHORT_STEPS:
            say(
                f"runs have {steps} steps; below {advice.SHORT_STEPS} little is learned and LoRA's optimal LR is higher"
            )
    return preset


def write_preset(
    path: Path, model: UserModel, data: UserData | UserProblems, choices: Choices, template: str | None
) -> Preset:
    """Write a preset, after it was validated, and return it.

    Args:
        path: the .yaml file to write.
        model: the model.
        data: the examples for supervised fine-tuning, or the problems for reinforcement learning.
        choices: the user's choices.
        template: the `chat_template` for a model without its own.

    Raises:
        UserError: the data or the choices make no valid preset.
    """
    text = preset_text(model, data, choices, template, path)
    preset = parse_preset(yaml.safe_load(text), path)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return preset


def _check_place(path: Path, force: bool) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} must end in .yaml, which distinguishes a preset's path from a name")
    if (PRESETS / f"{path.stem}.yaml").is_file():
        raise UserError(
            f"{path}: {path.stem!r} is the name of a shipped preset, with whose results its own would be mixed"
        )
    if path.exists() and not force:
        raise UserError(f"{path} exists; --force overwrites it")


def preset_text(
    model: UserModel, data: UserData | UserProblems, choices: Choices, template: str | None, path: Path
) -> str:
    """Return the preset as YAML text; see `write_preset`."""
    model_name, data_name = slug(model.name), slug(data.name)
    model_fields = _fields(model.spec) | ({"chat_template": template} if template else {})
    path_shown = one_line(str(path))
    heading = (
        "Does LoRA match full fine-tuning on this model and data? Written by `lorabench init`; change what you like.\n"
        f"  lorabench plan --preset {path_shown}\n"
        f"  lorabench run {path_shown}"
    )
    if isinstance(data, UserData):
        source, experiment = _sft_sections(model, data, choices, model_name, data_name)
    else:
        source, experiment = _rl_sections(model, data, choices, model_name, data_name)
    return yaml_text(
        heading,
        {
            "description": f"LoRA against full fine-tuning: {model.name} on {data.name}",
            "models": {model_name: model_fields},
            **source,
            "protocol": {"precision": "fp32" if choices.gpu is None else "bf16"},
            "margins": Noted(_MARGINS_NOTE, DEFAULT_MARGINS.model_dump()),
            "experiments": experiment,
            "execution": _execution(model, choices.gpu),
        },
    )


# The sections of a preset that differ between supervised and reinforcement learning: the data, and the experiment.
_Sections = tuple[dict[str, object], dict[str, object]]


def _sft_sections(model: UserModel, data: UserData, choices: Choices, model_name: str, data_name: str) -> _Sections:
    sizes = splits(data.usable, choices.held_out)
    training_tokens = data.mean_completion_tokens * sizes.train
    ranks = choices.ranks or suggested_ranks(model, training_tokens)
    fields = data.source | vars(sizes) | {"max_chars": max(32, data.max_chars)}
    fields |= {"mean_tokens": max(1, round(data.mean_tokens))}
    block = {
        "models": [model_name],
        "datasets": [data_name],
        "ranks": Noted(
            f"Rank {max(ranks)} has {model.lora_parameters(max(ranks)):,} parameters for {training_tokens:,.0f} scored "
            "training tokens.",
            Inline({"all": list(ranks)}),
        ),
        "batch_sizes": Noted(
            "Both methods reach their lowest loss at small batches.", [advice.batch_size(sizes.train)]
        ),
        "epochs": float(choices.epochs),
        "lrs": _lrs(model, "sft"),
        "seeds": choices.seeds,
    }
    about = f"{data.usable} usable examples, about {data.mean_completion_tokens:.0f} scored tokens each."
    return {"datasets": {data_name: Noted(about, fields)}}, {"rank": [block]}


def _rl_sections(
    model: UserModel, problems: UserProblems, choices: Choices, model_name: str, problems_name: str
) -> _Sections:
    sizes = splits(problems.usable, choices.held_out)
    recommended = advice.recommended_rank(model.sizes.hidden, model.lora_parameters(1), None)
    ranks = choices.ranks or tuple(sorted({1, recommended}))
    per_step = min(advice.PROBLEMS_PER_STEP, sizes.train)
    block = {
        "models": [model_name],
        "problems": [problems_name],
        "ranks": Noted("In the paper rank 1 is enough for reinforcement learning.", Inline({"all": list(ranks)})),
        "problems_per_step": per_step,
        "group_size": advice.GROUP_SIZE,
        "steps": advice.rl_steps(sizes.train, per_step, choices.epochs),
        "max_new_tokens": problems.max_new_tokens,
        "mean_response_tokens": Noted("A guess, for the estimate of the cost.", max(1, problems.max_new_tokens // 3)),
        "lrs": _lrs(model, "rl"),
        "seeds": choices.seeds,
    }
    source = Noted(f"{problems.usable} usable problems.", problems.source | vars(sizes))
    return {"problems": {problems_name: source}}, {"rl": [block]}


def _lrs(model: UserModel, task: Literal["sft", "rl"]) -> Noted:
    start = formats.lr(starting_lr(model.sizes.hidden, task), 2)
    return Noted(
        f"Each sweep finds its learning rates: it starts at {start} and walks until the lowest loss has a higher\n"
        "one on both sides. Seeds are at the three learning rates around the lowest loss.",
        AUTO,
    )


def suggested_ranks(model: UserModel, completion_tokens: float) -> tuple[int, ...]:
    """Return the recommended rank, a quarter of it, and 1, which shows where capacity ends."""
    high = advice.recommended_rank(model.sizes.hidden, model.lora_parameters(1), completion_tokens)
    return tuple(sorted({1, max(1, high // 4), high}))


def checked_gpu(name: str) -> str:
    """Return the name of a GPU if it is known.

    Raises:
        UserError: the GPU is not known.
    """
    if name not in GPUS:
        raise UserError(f"gpu {name!r} is not known; allowed: {', '.join(GPUS)}")
    return name


def _execution(model: UserModel, gpu: str | None) -> dict[str, object]:
    if gpu is not None:
        # A job takes the smallest number of GPUs with enough memory, up to this maximum.
        fitting = {"gpu": checked_gpu(gpu), "max_gpus": 8, "activation_checkpointing": "auto"}
        return {"threads": 8, "max_batch_tokens": 8192, **fitting}
    # A tiny model does not keep several threads busy.
    threads = 1 if isinstance(model.spec, TinyModel) else os.cpu_count() or 1
    return {"threads": threads, "max_batch_tokens": 4096, "gflops": _GFLOPS_PER_CORE * threads}


def _fields(spec: BaseModel) -> dict[str, object]:
    """Return the fields of a model that differ from their defaults, and a hub model's revision for the user to pin."""
    defaults = {name: field.default for name, field in type(spec).model_fields.items()}
    kept = {"revision"} if isinstance(spec, HubModel) else set()
    return {name: value for name, value in spec if name in kept or value != defaults[name]}
