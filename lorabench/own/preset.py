"""`lorabench init`: a small preset for a model and data of your own, in YAML with comments."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel

from lorabench.config import PRESETS, HubModel, Preset, TinyModel, parse_preset
from lorabench.errors import UserError
from lorabench.gpus import GPUS
from lorabench.own import advice
from lorabench.own.data import Data, look_at
from lorabench.own.model import Model, find_model
from lorabench.own.problems import Problems, look_at_problems
from lorabench.own.yaml_text import block, numbers, one_line, quoted, slug
from lorabench.records import atomic_path
from lorabench.utils import formats

# Losses on fewer examples are mostly noise; more cost time at each validation.
_MOST_VALIDATION, _MOST_TEST = 500, 1000
_FEWEST_EXAMPLES = 10
# On one core, measured with the tiny base and with SmolLM2-135M.
_GFLOPS_PER_CORE = 50.0


@dataclass(frozen=True)
class Choices:
    """What a user may choose."""

    ranks: tuple[int, ...] = ()
    """Empty for those that the data suggest."""
    seeds: int = 3
    epochs: float = 1.0
    held_out: float = 0.1
    """Share of the examples for validation, and as much for the test."""
    gpu: str | None = None
    grader: str | None = None
    """The data are problems for reinforcement learning, graded so."""


@dataclass(frozen=True)
class Splits:
    """Examples of each split."""

    train: int
    validation: int
    test: int


def splits(usable: int, share: float) -> Splits:
    """Sizes of disjoint splits of so many examples.

    Raises:
        UserError: there are too few.
    """
    if usable < _FEWEST_EXAMPLES:
        raise UserError(f"{usable} usable examples are too few; at least {_FEWEST_EXAMPLES} are needed")
    held_out = max(1, round(usable * share))
    validation, test = min(held_out, _MOST_VALIDATION), min(held_out, _MOST_TEST)
    return Splits(usable - validation - test, validation, test)


def init_preset(
    path: Path, model: str, data: str, form: str | None, choices: Choices, force: bool, say: Callable[[str], None]
) -> Preset:
    """Look at a model and data, and write a preset for them.

    Args:
        path: the .yaml file.
        model: see `find_model`.
        data: see `find_data`.
        form: the format of a file; None to tell it from the columns.
        say: takes a line of what was found.

    Raises:
        UserError: what is wrong with the model, the data, the choices or the path.
    """
    _check_place(path, force)
    if form is not None and choices.grader is not None:
        raise UserError("--format and --grader: problems have the columns question and answer; give one of them")
    found = find_model(model)
    say(str(found))
    examples: Data | Problems
    if choices.grader is None:
        examples, template = look_at(found, data, form)
    else:
        examples, template = look_at_problems(found, data, choices.grader)
    if template:
        say(f"the model has no chat template; the preset gives it one (chat_template: {template})")
    say(str(examples))
    preset = write_preset(path, found, examples, choices, template)
    source = next(iter(preset.sources.values()))
    say(f"split: {source.train} train, {source.validation} validation, {source.test} test")
    for rank in preset.experiments.rank or []:
        steps = int(source.train * rank.epochs) // rank.batch_sizes[0]
        if steps < advice.SHORT_STEPS:
            short = f"below {advice.SHORT_STEPS} little is learned and the LoRA optimum lies higher"
            say(f"runs have {steps} steps; {short}")
    return preset


def write_preset(path: Path, model: Model, data: Data | Problems, choices: Choices, template: str | None) -> Preset:
    """Write a preset, validated, and return it.

    Args:
        template: a `chat_template` for a model without one.

    Raises:
        UserError: the data or the choices make no preset.
    """
    text = preset_text(model, data, choices, template, path)
    preset = parse_preset(yaml.safe_load(text), path)
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return preset


def _check_place(path: Path, force: bool) -> None:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} must end in .yaml, by which a preset's path is told from a name")
    if (PRESETS / f"{path.stem}.yaml").is_file():
        raise UserError(
            f"{path}: {path.stem!r} is the name of a shipped preset, whose results it would mix with its own"
        )
    if path.exists() and not force:
        raise UserError(f"{path} exists; --force overwrites it")


def preset_text(model: Model, data: Data | Problems, choices: Choices, template: str | None, path: Path) -> str:
    """The preset as YAML; see `write_preset`."""
    names = quoted(slug(model.name)), quoted(slug(data.name))
    parts = (
        _sft_parts(model, data, choices, *names) if isinstance(data, Data) else _rl_parts(model, data, choices, *names)
    )
    model_fields = _fields(model.spec) | ({"chat_template": template} if template else {})
    shown = one_line(str(path))
    return f"""\
# Does LoRA match full fine-tuning on this model and data? Written by `lorabench init`; change what you like.
#   lorabench plan --preset {shown}
#   snakemake --cores all --config preset={shown}
description: {quoted(f"LoRA against full fine-tuning: {model.name} on {data.name}")}
models:
  {names[0]}:
{block(model_fields)}
{parts.data}
protocol:
  precision: {"fp32" if choices.gpu is None else "bf16"}
experiments:
{parts.experiment}
execution:
{block(_execution(model, choices.gpu))}
"""


@dataclass(frozen=True)
class _Parts:
    """What differs between supervised and reinforcement learning, as YAML."""

    data: str
    experiment: str


def _sft_parts(model: Model, data: Data, choices: Choices, model_name: str, data_name: str) -> _Parts:
    sizes = splits(data.usable, choices.held_out)
    ranks = choices.ranks or suggested_ranks(model, data.mean_completion_tokens * sizes.train)
    fields = data.source | vars(sizes) | {"max_chars": max(32, data.max_chars)}
    fields |= {"mean_tokens": max(1, round(data.mean_tokens))}
    fullft, lora = _law(model)
    return _Parts(
        f"""\
datasets:
  # {data.usable} usable examples, about {data.mean_completion_tokens:.0f} scored tokens each.
  {data_name}:
{block(fields)}""",
        f"""\
  rank:
    - models: [{model_name}]
      datasets: [{data_name}]
      # Rank {max(ranks)} has {model.lora_parameters(max(ranks)):,} parameters for \
{data.mean_completion_tokens * sizes.train:,.0f} scored training tokens.
      ranks: {{all: {list(ranks)}}}
      # Small: both methods do best there.
      batch_sizes: [{advice.batch_size(sizes.train)}]
      epochs: {choices.epochs}
      # Three points per decade around {_lr_source(model, fullft, lora)}.
{_lr_lines(fullft, lora, choices)}""",
    )


def _rl_parts(model: Model, problems: Problems, choices: Choices, model_name: str, problems_name: str) -> _Parts:
    sizes = splits(problems.usable, choices.held_out)
    ranks = choices.ranks or tuple(
        sorted({1, advice.recommended_rank(model.sizes.hidden, model.lora_parameters(1), None)})
    )
    fullft, lora = _law(model)
    per_step = min(advice.PROBLEMS_PER_STEP, sizes.train)
    return _Parts(
        f"""\
problems:
  # {problems.usable} usable problems.
  {problems_name}:
{block(problems.source | vars(sizes))}""",
        f"""\
  rl_math:
    - models: [{model_name}]
      problems: [{problems_name}]
      # In the paper rank 1 is enough.
      ranks: {{all: {list(ranks)}}}
      problems_per_step: {per_step}
      group_size: {advice.GROUP_SIZE}
      steps: {advice.rl_steps(sizes.train, per_step, choices.epochs)}
      max_new_tokens: {problems.max_new_tokens}
      # A guess, for the estimate of cost.
      mean_response_tokens: {max(1, problems.max_new_tokens // 3)}
      # Three points per decade around a quarter of {_lr_source(model, fullft, lora)}.
{_lr_lines(advice.rl_lr(fullft), advice.rl_lr(lora), choices)}""",
    )


def _law(model: Model) -> tuple[advice.Lr, advice.Lr]:
    fullft, lora = (advice.law_lr(model.family, model.sizes.hidden, method) for method in ("fullft", "lora"))
    return fullft, lora


def _lr_lines(fullft: advice.Lr, lora: advice.Lr, choices: Choices) -> str:
    return f"""\
      # If the report finds an optimum at an edge, widen the grid there.
      lrs:
        fullft: {numbers(advice.lr_grid(fullft))}
        lora: {numbers(advice.lr_grid(lora))}
      seeds: {choices.seeds}"""


def suggested_ranks(model: Model, completion_tokens: float) -> tuple[int, ...]:
    """The recommended rank, a quarter of it, and 1, which shows where capacity ends."""
    high = advice.recommended_rank(model.sizes.hidden, model.lora_parameters(1), completion_tokens)
    return tuple(sorted({1, max(1, high // 4), high}))


def _lr_source(model: Model, fullft: advice.Lr, lora: advice.Lr) -> str:
    if fullft.value is None or lora.value is None:
        return f"the range for a family that the paper's law does not cover, {one_line(model.family)}"
    return f"the paper's law: {formats.lr(fullft.value, 2)} and {formats.lr(lora.value, 2)}"


def checked_gpu(name: str) -> str:
    """The name of a GPU as a user wrote it.

    Raises:
        UserError: it is not known.
    """
    if name not in GPUS:
        raise UserError(f"gpu {name!r} is not known; allowed: {', '.join(GPUS)}")
    return name


def _execution(model: Model, gpu: str | None) -> dict[str, object]:
    if gpu is not None:
        # A job asks for as few GPUs as hold it.
        return {"threads": 8, "max_batch_tokens": 8192, "gpu": checked_gpu(gpu), "max_gpus": 8}
    # Tiny models do not fill several threads.
    threads = 1 if isinstance(model.spec, TinyModel) else os.cpu_count() or 1
    return {"threads": threads, "max_batch_tokens": 4096, "gflops": _GFLOPS_PER_CORE * threads}


def _fields(spec: BaseModel) -> dict[str, object]:
    """What a preset has to say of a model; a hub model's revision too, since that is to be pinned."""
    defaults = {name: field.default for name, field in type(spec).model_fields.items()}
    kept = {"revision"} if isinstance(spec, HubModel) else set()
    return {name: value for name, value in spec if name in kept or value != defaults[name]}
