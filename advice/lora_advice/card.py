"""The model card of an adapter: how it was trained, at which learning rates it would do best, and what the audit says.

It is read from the files that trainers leave: PEFT's `adapter_config.json`, `trainer_state.json` of transformers in the
folder or its last checkpoint, the list of hyperparameters in a card of transformers, and the `record.json` of the
suite's own runs. No pickle is read, such as `training_args.bin`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from lora_advice import formats
from lora_advice.adapter_config import NAME
from lora_advice.audit import check_run
from lora_advice.audit.config import Task, TrainingConfig
from lora_advice.audit.lr import judge
from lora_advice.audit.readers import adapter
from lora_advice.audit.regret import shipped_evidence
from lora_advice.errors import UserError
from lora_advice.files import write_text
from lora_advice.foreign import Foreign, typed
from lora_advice.models import HUB_ID, facts
from lora_advice.variants import VARIANT_NAMES

README = "README.md"
START, END = "<!-- lora-advice: what follows is renewed by `lora-advice card` -->", "<!-- end of lora-advice -->"

_LISTED = r"^- (learning_rate|total_train_batch_size|train_batch_size|seed): (\S+)$"
"""The lines of a card of transformers with hyperparameters."""
_SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}
"""The learning rate over the highest one at a share of all steps."""


class _State(Foreign):
    """What is read of `trainer_state.json`."""

    global_step: int
    max_steps: int = Field(ge=1)
    log_history: list[dict[str, Any]]


class _Spec(Foreign):
    """What is read of a record of the suite."""

    task: Task
    lr: float
    batch_size: int
    steps: int
    seed: int
    dataset: str


class _Record(Foreign):
    spec: _Spec


class Card(NamedTuple):
    """What is known of an adapter's training."""

    config: TrainingConfig
    seed: str | None = None
    dataset: str | None = None


def write_card(folder: Path, overwrite: bool = False) -> Path:
    """Write the card of the adapter in a folder, and return its path; raises UserError if there is no adapter.

    Of a card that is there, all but the part between the lines START and END stays, which comes to its end if it is not
    there yet. With `overwrite` it is replaced as a whole.
    """
    card, path = read_training(folder), folder / README
    part = f"{START}\n{_part(card)}\n{END}\n"
    if overwrite or not path.exists():
        write_text(f"{_front_matter(card.config)}\n# {escaped(folder.resolve().name)}\n\n{part}", path)
        return path
    text = _text(path)
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(f"{END}\n")
    if bool(start) != bool(end) or (not start and END in text):
        raise UserError(f"{path} has one of the lines {START} and {END} without the other: mend it, or use --overwrite")
    if not start:
        before = f"{text.rstrip()}\n\n" if text.strip() else ""
    write_text(f"{before}{part}{after}", path)
    return path


def read_training(folder: Path) -> Card:
    """Return what the files of an adapter's folder say of its training; raises UserError if they are none."""
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {NAME}; the folder of an adapter that PEFT has saved is needed")
    [config] = adapter.read(path, _text(path))
    card = Card(replace(config, lines={}))
    if (readme := folder / README).is_file():
        card = _with_list(card, dict(re.findall(_LISTED, _text(readme), re.MULTILINE)))
    checkpoints = [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("trainer_state.json")]
    states = [typed(_State, _text(file), str(file)) for file in checkpoints]
    if states:
        card = _with_state(card, max(states, key=lambda state: state.global_step))
    record = folder.parent / "record.json"
    if folder.name == "weights" and record.is_file():
        spec = typed(_Record, _text(record), str(record)).spec
        said: dict[str, Any] = {"task": spec.task, "lr": spec.lr, "steps": float(spec.steps), "devices": 1}
        # In RL the batch counts responses, as a micro-batch does.
        config = replace(card.config, **said, micro_batch=spec.batch_size, accumulation=1)
        card = Card(config, str(spec.seed), spec.dataset)
    return card


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from error


def _with_list(card: Card, listed: Mapping[str, str]) -> Card:
    """Add the hyperparameters of a card of transformers."""
    numbers = {
        name: float(value)
        for name, value in listed.items()
        if re.fullmatch(r"\d{1,9}(\.\d{1,20})?(e-?\d{1,2})?", value)
    }
    # The total is listed where it is not that of one device.
    batch = numbers.get("total_train_batch_size") or numbers.get("train_batch_size")
    config = replace(card.config, lr=numbers.get("learning_rate"), global_batch=int(batch) if batch else None)
    return card._replace(config=config, seed=listed.get("seed"))


def _with_state(card: Card, state: _State) -> Card:
    """Add what the state of a trainer says: its length, its task by what it logged, and the highest learning rate."""
    keys = {key for row in state.log_history for key in row}
    task: Task | None = "sft" if "loss" in keys else None
    if any(key.startswith("rewards/chosen") for key in keys):
        task = "preference"
    elif "reward" in keys:
        task = "rl"
    pairs = ((row.get("step"), row.get("learning_rate")) for row in state.log_history)
    lrs = {step: lr for step, lr in pairs if isinstance(step, int) and isinstance(lr, float) and lr > 0}
    lr, schedule = highest_lr(lrs, state.max_steps)
    config = replace(card.config, task=task, steps=float(state.global_step), schedule=schedule)
    return card._replace(config=replace(config, lr=card.config.lr or lr))


def highest_lr(logged: Mapping[int, float], steps: int) -> tuple[float | None, str | None]:
    """Return the highest learning rate of a run, and its schedule if all values that it logged lie on one.

    A log of every tenth step lacks the first one, which a line or a cosine through all values tells. Some versions log
    the learning rate of the step, others of the next.
    """
    for before, (name, shape) in product((1, 0), _SHAPES.items()):
        peaks = [lr / shape((step - before) / steps) for step, lr in logged.items() if step < steps + before]
        if len(peaks) > 1 and max(peaks) <= min(peaks) * (1 + 1e-4):
            return float(f"{peaks[0]:.6g}"), name
    return max(logged.values(), default=None), None


def _front_matter(config: TrainingConfig) -> str:
    """Return the metadata that hubs read; a base model that is no id of a hub is left out, since a hub refuses it."""
    data: dict[str, Any] = {"library_name": "peft", "tags": ["lora", *config.variants, "lora-advice"]}
    base = config.model or ""
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        data = {"base_model": base, **data}
        data["tags"].insert(0, f"base_model:adapter:{base}")
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _part(card: Card) -> str:
    """Return the part of the card that is renewed."""
    config, model = card.config, facts(card.config.model)
    names = [VARIANT_NAMES[variant] for variant in config.variants] or ["LoRA"]
    modules = ", ".join([*(config.targets or ()), *config.target_parameters])
    lr = "not known" if config.lr is None else formats.lr(config.lr)
    # The recommended learning rate does not depend on the one that was used.
    judged = judge(replace(config, lr=config.lr or 1e-4), model, shipped_evidence())
    best = f"not known, since {judged}"
    if not isinstance(judged, str):
        ends = judged[0].recommended
        best = f"{formats.lr(ends.mean, 2)}, 95% interval {formats.lr(ends.low, 2)} to {formats.lr(ends.high, 2)}"
    rows = {
        "base model": config.model,
        "method": " and ".join(names),
        "rank": config.rank,
        "alpha": None if config.alpha is None else f"{config.alpha:g}",
        "modules with LoRA": modules,
        "data": card.dataset,
        "learning rate": lr + (f" ({config.schedule})" if config.schedule else ""),
        "optimal learning rate of such runs": best,
        "batch size": config.batch_size,
        "steps": None if config.steps is None else f"{config.steps:g}",
        "seed": card.seed,
    }
    lines = ["## How this adapter was trained", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {escaped(str(value))} |" for name, value in rows.items() if value is not None]
    lines += ["", "### What the audit says", ""]
    for finding in check_run(config):
        said = f"{finding.message} [{finding.source}; {finding.sure}]"
        lines.append(f"- **{finding.level}** `{finding.code}`: {escaped(said)}")
    lines += ["", f"Read by lora-advice {version('lora-advice')} from the files of the adapter and its trainer."]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return foreign text for a line of Markdown or a cell of a table: what would be markup is shown as it is.

    >>> print(escaped("a|b <i>`c`"))
    a\\\\|b \\\\<i\\\\>\\\\`c\\\\`
    """
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$])", r"\\\1", formats.printable(text))
