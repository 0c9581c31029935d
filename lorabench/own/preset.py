"""`lorabench init`: a small preset for a model and data of your own, in YAML with comments."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel

from lorabench.config import PRESETS, HubModel, Preset, TinyModel, parse_preset, yaml_number
from lorabench.errors import UserError
from lorabench.gpus import GPUS
from lorabench.own import advice
from lorabench.own.data import Data, look_at
from lorabench.own.model import Model, find_model
from lorabench.records import atomic_path

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
    found = find_model(model)
    say(str(found))
    examples, template = look_at(found, data, form)
    if template:
        say(f"the model has no chat template; the preset gives it one (chat_template: {template})")
    say(str(examples))
    preset = write_preset(path, found, examples, choices, template)
    dataset = next(iter(preset.datasets.values()))
    say(f"split: {dataset.train} train, {dataset.validation} validation, {dataset.test} test")
    block = (preset.experiments.rank or [])[0]
    steps = int(dataset.train * block.epochs) // block.batch_sizes[0]
    if steps < advice.SHORT_STEPS:
        say(f"runs have {steps} steps; below {advice.SHORT_STEPS} little is learned and the LoRA optimum lies higher")
    return preset


def write_preset(path: Path, model: Model, data: Data, choices: Choices, template: str | None) -> Preset:
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


def preset_text(model: Model, data: Data, choices: Choices, template: str | None, path: Path) -> str:
    """The preset as YAML; see `write_preset`."""
    sizes = splits(data.usable, choices.held_out)
    batch = advice.batch_size(sizes.train)
    ranks = choices.ranks or suggested_ranks(model, data.mean_completion_tokens * sizes.train)
    model_name, data_name = _quoted(_slug(model.name)), _quoted(_slug(data.name))
    fullft, lora = (advice.law_lr(model.family, model.sizes.hidden, method) for method in ("fullft", "lora"))
    model_fields = _fields(model.spec) | ({"chat_template": template} if template else {})
    data_fields = data.source | vars(sizes) | {"max_chars": max(32, data.max_chars)}
    data_fields |= {"mean_tokens": max(1, round(data.mean_tokens))}
    # What is put into comments must not leave its line.
    shown, family = _one_line(str(path)), _one_line(model.family)
    return f"""\
# Does LoRA match full fine-tuning on this model and data? Written by `lorabench init`; change what you like.
#   lorabench plan --preset {shown}
#   snakemake --cores all --config preset={shown}
description: {_quoted(f"LoRA against full fine-tuning: {model.name} on {data.name}")}
models:
  {model_name}:
{_block(model_fields)}
datasets:
  # {data.usable} usable examples, about {data.mean_completion_tokens:.0f} scored tokens each.
  {data_name}:
{_block(data_fields)}
protocol:
  precision: {"fp32" if choices.gpu is None else "bf16"}
experiments:
  rank:
    - models: [{model_name}]
      datasets: [{data_name}]
      # Rank {max(ranks)} has {model.lora_parameters(max(ranks)):,} parameters for \
{data.mean_completion_tokens * sizes.train:,.0f} scored training tokens.
      ranks: {{all: {list(ranks)}}}
      # Small: both methods do best there.
      batch_sizes: [{batch}]
      epochs: {choices.epochs}
      # Three points per decade around {_lr_source(family, fullft, lora)}.
      # If the report finds an optimum at an edge, widen the grid there.
      lrs:
        fullft: {_numbers(advice.lr_grid(fullft))}
        lora: {_numbers(advice.lr_grid(lora))}
      seeds: {choices.seeds}
execution:
{_block(_execution(model, choices.gpu))}
"""


def suggested_ranks(model: Model, completion_tokens: float) -> tuple[int, ...]:
    """The recommended rank, a quarter of it, and 1, which shows where capacity ends."""
    high = advice.recommended_rank(model.sizes.hidden, model.lora_parameters(1), completion_tokens)
    return tuple(sorted({1, max(1, high // 4), high}))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _lr_source(family: str, fullft: advice.Lr, lora: advice.Lr) -> str:
    if fullft.value is None or lora.value is None:
        return f"the range for a family that the paper's law does not cover, {family}"
    return f"the paper's law: {fullft.value:.2g} and {lora.value:.2g}"


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
    return {"threads": threads, "max_batch_tokens": 2048, "gflops": _GFLOPS_PER_CORE * threads}


def _fields(spec: BaseModel) -> dict[str, object]:
    """What a preset has to say of a model; a hub model's revision too, since that is to be pinned."""
    defaults = {name: field.default for name, field in type(spec).model_fields.items()}
    kept = {"revision"} if isinstance(spec, HubModel) else set()
    return {name: value for name, value in spec if name in kept or value != defaults[name]}


def _block(fields: dict[str, object]) -> str:
    indent = "  " if "kind" not in fields else "    "
    return "\n".join(f"{indent}{name}: {_scalar(value)}" for name, value in fields.items())


def _scalar(value: object) -> str:
    if isinstance(value, float):
        return yaml_number(value)
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    """A text as YAML on one line, whatever is in it; words that are nothing else to YAML stay bare."""
    bare = re.fullmatch(r"[A-Za-z][\w./-]*", text) and yaml.safe_load(text) == text
    return text if bare else yaml.safe_dump(text, default_style='"', width=10**9).strip()


def _numbers(lrs: list[float]) -> str:
    # As the shipped presets write them, 2.2e-4, which YAML reads as a number.
    return f"[{', '.join(f'{lr:.1e}'.replace('e-0', 'e-') for lr in lrs)}]"


def _slug(name: str) -> str:
    """A name for a preset: `meta-llama/Llama-3.2-1B` becomes `llama-3-2-1b`."""
    stem = re.sub(r"\.(gguf|jsonl|json|csv|parquet)$", "", name.rstrip("/").rpartition("/")[2].lower())
    return re.sub(r"[^a-z0-9]+", "-", stem).strip("-") or "own"
