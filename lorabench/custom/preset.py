"""A small preset for your own model and data, written by `lorabench init` from the template preset.yaml.j2.

The settings to start from (rank, batch size, RL steps) are those of the paper and of its authors' code, which is
tinker-cookbook, their library's public repository.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from lorabench.config.inputs import TinyModel
from lorabench.config.loading import check_name, is_shipped, parse_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.config.preset import Preset
from lorabench.custom.data import UserData, examine, examine_problems
from lorabench.custom.model import UserModel, find_model
from lorabench.errors import UserError
from lorabench.planning.plan import starting_lr
from lorabench.utils import formats
from lorabench.utils.files import atomic_path
from lorabench.utils.yaml_files import parse_yaml

DEFAULT_RANK = 32
"""The default rank of the authors' library."""
MAX_RANK = 512
"""The paper's largest rank."""
SHORT_STEPS = 100
"""Steps below which the paper calls a run short."""
GROUP_SIZE = PROBLEMS_PER_STEP = 16
RL_STEPS = (50, 300)
"""The smallest and the largest number of steps in reinforcement learning."""

_LARGEST_BATCH, _SMALLEST_BATCH = 32, 4
# Larger validation and test splits reduce the noise of a loss little and cost time at each validation.
_MAX_VALIDATION, _MAX_TEST = 500, 1000
_MIN_EXAMPLES = 10
# The speed of training on one core, measured with the tiny base and with SmolLM2-135M.
_GFLOPS_PER_CORE = 50.0


def recommended_batch(examples: int) -> int:
    """Return a batch size: 32, halved down to 4 until an epoch has 100 steps.

    In the paper both methods reach their lowest loss at small batches, and LoRA loses more at large ones.
    """
    size = _LARGEST_BATCH
    while size > _SMALLEST_BATCH and examples // size < SHORT_STEPS:
        size //= 2
    return min(size, examples)


def recommended_rank(model: UserModel, completion_tokens: float | None) -> int:
    """Return the authors' default rank, or the least power of two at which LoRA has a parameter per completion token.

    That is by the documentation of the authors' library. The highest rank is the paper's, or the one at which LoRA's
    matrices outgrow the weights.
    """
    share = max(1.0, (completion_tokens or 1.0) / model.lora_parameters(1))
    return min(max(DEFAULT_RANK, 1 << math.ceil(math.log2(share))), MAX_RANK, model.sizes.hidden // 2)


@dataclass(frozen=True)
class Choices:
    """The choices that a user can make in a preset."""

    ranks: tuple[int, ...] = ()  # Ascending; empty to take the ranks that the amount of data suggests.
    seeds: int = 3
    epochs: float = 1.0
    held_out: float = 0.1  # The share of the examples for validation, and the same share for the test.
    gpu: str | None = None  # None for a CPU.
    grader: str | None = None  # The grader of problems for reinforcement learning; None for supervised fine-tuning.
    variants: tuple[str, ...] = ()  # Variants of LoRA that are trained beside it.


def init_preset(
    path: Path, model: str, data: str, form: str | None, choices: Choices, force: bool, say: Callable[[str], None]
) -> Preset:
    """Examine a model (see `find_model`) and data (`examine`, `examine_problems`), and write a preset file for them.

    Without a `form` the format of a data file is recognized by its columns. With `force` an existing file is replaced.
    `say` is called with lines that describe the model, the data and the splits. UserError says that the model, the
    data, the choices or the path are wrong; then nothing is written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} must end in .yaml, which distinguishes a preset's path from a name")
    check_name(path)
    if is_shipped(path.stem):
        raise UserError(f"{path}: {path.stem!r} is the name of a shipped preset; choose another")
    if os.path.exists(path) and not force:
        raise UserError(f"{path} exists; --force overwrites it")
    if form is not None and choices.grader is not None:
        raise UserError("--format and --grader: problems have the columns question and answer; give one of them")
    described = find_model(model)
    say(str(described))
    if choices.grader is None:
        examples, template = examine(described, data, form)
    else:
        examples, template = examine_problems(described, data, choices.grader)
    if template:
        say(f"the model has no chat template; the preset gives it one (chat_template: {template})")
    say(str(examples))
    text = _text(described, examples, choices, template, path)
    preset = parse_preset(parse_yaml(text, path), path)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    source = next(iter(preset.sources.values()))
    say(f"split: {source.train} train, {source.validation} validation, {source.test} test")
    for block in preset.experiments.rank or []:
        steps = int(source.train * block.epochs) // block.batch_sizes[0]
        if steps < SHORT_STEPS:
            say(f"runs have {steps} steps; below {SHORT_STEPS} little is learned and LoRA's optimal LR is higher")
    return preset


def _text(model: UserModel, data: UserData, choices: Choices, template: str | None, path: Path) -> str:
    """Return the preset as YAML text: it fine-tunes on examples, or does reinforcement learning on problems."""
    sizes = splits(data.usable, choices.held_out)
    data_fields, train = data.source | sizes, sizes["train"]
    settings: dict[str, Any] = {}
    if data.mean_completion_tokens is not None:
        tokens = data.mean_completion_tokens * train
        high = recommended_rank(model, tokens)
        # A quarter of the recommended rank, and rank 1, show where capacity ends.
        ranks = choices.ranks or tuple(sorted({1, max(1, high // 4), high}))
        about = f"{data.usable} usable examples, about {data.mean_completion_tokens:.0f} scored tokens each."
        settings |= {"tokens": tokens, "parameters": model.lora_parameters(max(ranks))}
        settings |= {"batch_size": recommended_batch(train), "epochs": float(choices.epochs)}
    else:
        ranks = choices.ranks or tuple(sorted({1, recommended_rank(model, None)}))
        about = f"{data.usable} usable problems."
        per_step, (fewest, most) = min(PROBLEMS_PER_STEP, train), RL_STEPS
        # As many steps as go through all problems `epochs` times.
        steps = min(most, max(fewest, math.ceil(choices.epochs * train / per_step)))
        settings |= {"problems_per_step": per_step, "group_size": GROUP_SIZE, "steps": steps}
        settings["max_new_tokens"] = data.max_new_tokens
    # A tiny model does not keep several threads busy.
    threads = 1 if isinstance(model.spec, TinyModel) else os.cpu_count() or 1
    # The model's fields that differ from their defaults, and a hub model's revision for the user to pin.
    known = type(model.spec).model_fields
    model_fields = {name: value for name, value in model.spec if name == "revision" or value != known[name].default}
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["yaml"] = yaml_text
    sft = choices.grader is None
    return environment.from_string(Path(__file__).with_name("preset.yaml.j2").read_text(encoding="utf-8")).render(
        # A comment must not leave its line.
        path=" ".join(str(path).split()),
        description=f"LoRA against full fine-tuning: {model.name} on {data.name}",
        model_name=_slug(model.name),
        model_fields=model_fields | ({"chat_template": template} if template else {}),
        sft=sft,
        about_data=about,
        data_name=_slug(data.name),
        data_fields=data_fields,
        gpu=choices.gpu,
        threads=threads,
        gflops=_GFLOPS_PER_CORE * threads,
        margins=DEFAULT_MARGINS.model_dump(),
        ranks=list(ranks),
        start=formats.lr(starting_lr(model.sizes.hidden, "sft" if sft else "rl"), 2),
        seeds=choices.seeds,
        variants=list(dict.fromkeys(("lora", *choices.variants))) if choices.variants else [],
        **settings,
    )


def splits(usable: int, share: float) -> dict[str, int]:
    """Return the sizes of disjoint splits by name; validation and test each have a share of the usable examples."""
    if usable < _MIN_EXAMPLES:
        raise UserError(f"{usable} usable examples are too few; at least {_MIN_EXAMPLES} are needed")
    held_out = max(1, round(usable * share))
    validation, test = min(held_out, _MAX_VALIDATION), min(held_out, _MAX_TEST)
    return {"train": usable - validation - test, "validation": validation, "test": test}


def yaml_text(value: object) -> str:
    """Return a value as YAML of one line: a plain word without quotes, any other text in quotes."""
    style = '"' if isinstance(value, str) and not re.fullmatch(r"[A-Za-z][\w./-]*", value) else None
    text = yaml.safe_dump(value, default_style=style, default_flow_style=True, width=math.inf, sort_keys=False)
    return str(text).removesuffix("...\n").strip()


def _slug(name: str) -> str:
    """Return a name as presets allow it: `meta-llama/Llama-3.2-1B` becomes `llama-3-2-1b`."""
    stem = re.sub(r"\.(gguf|jsonl|json|csv|parquet)$", "", name.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-")[:50] or "own"
