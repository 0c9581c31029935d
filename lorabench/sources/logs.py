"""Runs as the logs of other trainers have them, made into the tidy tables.

Trainers and trackers call one thing by many names. What a run's settings do not say is looked for in its log of
learning rates and in its name; what is still unknown is asked for, all at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.config.fields import SUFFIXES
from lorabench.errors import UserError
from lorabench.sources.source import check_tables
from lorabench.store.checks import listed
from lorabench.store.io import typed_columns
from lorabench.store.schemas import RUNS
from lorabench.store.tables import TRAINING_LOSS, Tables

_SETTINGS = {
    "model": ("base_model_name_or_path", "model_name_or_path", "base_model", "_name_or_path", "model_name"),
    "dataset": ("dataset_name", "datasets", "dataset_id"),
    "method": ("finetuning_type", "peft_type", "use_peft", "use_lora"),
    "rank": ("lora_r", "lora_rank", "r"),
    "alpha": ("lora_alpha",),
    "placement": ("target_modules", "lora_target_modules", "lora_target"),
    "lr": ("learning_rate",),
    "batch_size": ("total_train_batch_size", "global_batch_size", "effective_batch_size", "train_batch_size"),
    "steps": ("train/global_step", "global_step"),
    "seed": ("random_seed",),
    "schedule": ("lr_scheduler_type", "lr_scheduler"),
    "family": ("model_type",),
    "hidden_size": (),
}
"""The names that settings have elsewhere, beside that of the column of `runs`; the first that a run has counts."""

_METHODS = {"lora": "lora", "full": "fullft", "fullft": "fullft", "fft": "fullft", "true": "lora", "false": "fullft"}
"""The methods by what settings and names of runs say; a truth value is that of `use_peft`."""

_ASKED = {
    "model": "NAME  # the base model",
    "dataset": "NAME  # the data they were trained on",
    "method": "METHOD  # lora or fullft",
    "lr": "NUMBER  # the learning rate, the highest if it falls",
    "batch_size": "NUMBER  # examples per optimizer step, those of all devices and of accumulated steps",
    "steps": "NUMBER  # optimizer steps",
    "seed": "NUMBER  # the seed of data order and initialization",
    "test_loss": "NAME  # which logged loss is the test loss (and validation_loss=NAME, if LRs are picked by another)",
    "rank": "NUMBER  # the rank of LoRA",
    "alpha": "NUMBER  # alpha of LoRA",
    "placement": "LAYERS  # all, attn or mlp: the layers with LoRA",
}
"""What must be known of each run, the last three of LoRA only, and what a person who is asked writes for it."""

_LORA = ("rank", "alpha", "placement")

_IN_NAMES = {"lr": "learning_rate|lr", "seed": "seed|s", "rank": "rank|r", "alpha": "alpha", "batch_size": "batch|bs"}
"""The words before a number in the name of a run, as in `lora-r8-lr1e-4-seed0`."""

_WHOLE = ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
          {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}, {"all-linear"}, {"all"})  # fmt: skip


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}
"""The learning rate over the highest, at a share of all steps, by the schedules that are told from a log of it."""


@dataclass(frozen=True)
class LoggedRun:
    """A run as its trainer or tracker logged it, by the names that these use."""

    name: str
    settings: dict[str, Any]
    """What it was trained with; parts of a nested setting are joined by points, as in `peft_config.default.r`."""
    history: dict[str, dict[int, float]]
    """The values of each metric by the number of optimizer steps before."""


def tidy_tables(runs: Sequence[LoggedRun], said: Sequence[str], place: Path) -> tuple[Tables, list[str]]:
    """Return the tables `runs` and `curves` of logged runs, and sentences on what was read and how.

    `said` has lines KEY=VALUE or RUN:KEY=VALUE, with which a person says a column of `runs`, `test_loss` or
    `validation_loss` (the name of a logged loss) of all runs or of those whose names a pattern fits. UserError lists
    everything that is not known, says that a line is wrong, that a run is of reinforcement learning, or what
    `check_tables` does.
    """
    rows, points, notes, missing = [], [], dict[str, list[str]](), dict[str, list[str]]()
    answers = [_answer(line, [run.name for run in runs], place) for line in said]
    for run in runs:
        if _series(run.history, "reward"):
            raise UserError(f"{place}: {run.name} logs rewards; allowed: runs of supervised fine-tuning")
        facts = _facts(run, notes) | {key: value for key, value, names in answers if run.name in names}
        facts |= dict.fromkeys(_LORA) if facts["method"] == "fullft" else {}
        train, test, valid = _losses(run.history, facts)
        finite = all(math.isfinite(facts.get(name) or 0) for name in RUNS.names if name.startswith("final_"))
        if finite and not facts["finished"]:
            notes.setdefault("left out, since they did not reach their last step", []).append(run.name)
            continue
        for fact in _ASKED:
            if facts.get(fact) is None and not (facts["method"] == "fullft" and fact in _LORA):
                missing.setdefault(fact, []).append(run.name)
        rows.append(facts | {"run_id": run.name, "task": "sft", "status": "done" if finite else "diverged"})
        if not test or max(test) < max([*train, *test]):
            why = "last evaluated before their last step" if test else TRAINING_LOSS
            notes.setdefault(why, []).append(run.name)
        losses = {"train": train, "validation": valid or test, "test": test if valid else {}}
        for split, values in (losses | {"grad_norm": _series(run.history, "grad_norm")}).items():
            named = (split, "nll") if split in losses else ("train", split)
            points += [(run.name, step, *named, value) for step, value in values.items()]
    if missing:
        raise UserError(_questions(missing, runs, place))
    if not rows:
        raise UserError(f"{place}: holds no finished runs of this kind")
    known = [name for name in RUNS.names if any(row.get(name) is not None for row in rows)]
    table = typed_columns(pd.DataFrame(rows, columns=known), "runs", place)
    for name in table.columns.intersection(["family", "hidden_size"]):
        # The files of an adapter do not say what those of the whole model do.
        table[name] = table.groupby("model")[name].transform("first")
    curves = pd.DataFrame(points, columns=["run_id", "step", "split", "metric", "value"])
    curves["examples"] = curves["step"] * curves["run_id"].map(table.set_index("run_id")["batch_size"])
    curves = typed_columns(curves.replace([math.inf, -math.inf], math.nan), "curves", place)
    check_tables(table, curves, place)
    labels = ["method", *(name for name in _LORA if name in known)]
    arms: Any = table.groupby(labels, dropna=False)
    read = [
        f"{', '.join(f'{name} {part}' for name, part in zip(labels, arm, strict=True) if pd.notna(part))}: "
        f"{len(group)} runs at learning rates of "
        f"{', '.join(f'{lr:g}' for lr in sorted(set(group['lr'])))}, seeds {listed(group['seed'])}"
        for arm, group in arms
    ]
    return Tables(table, curves), [*read, *(f"{what}: {_some(names)}" for what, names in notes.items())]


def _answer(line: str, names: Sequence[str], place: Path) -> tuple[str, str, list[str]]:
    """Return the key and the value that a line says, and the names of the runs of which it says it."""
    parts = re.fullmatch(r"(?:(.*?):)??(\w+)=(.+)", line)
    if parts is None or parts[2] not in (*RUNS.names, "test_loss", "validation_loss"):
        raise UserError(f"--set {line!r}: allowed: KEY=VALUE or RUN:KEY=VALUE, with a KEY such as {', '.join(_ASKED)}")
    chosen = [name for name in names if fnmatchcase(name, parts[1] or "*")]
    if not chosen:
        raise UserError(f"--set {line!r}: no run of {place} has this name; allowed: {_some(names)}")
    return parts[2], parts[3], chosen


def _questions(missing: Mapping[str, Sequence[str]], runs: Sequence[LoggedRun], place: Path) -> str:
    """Return the lines that ask for everything that is missing, each with the option that says it."""
    losses = sorted({key for run in runs for key in run.history if "loss" in key.lower()})
    asked = {
        fact: f"  --set {fact}={_ASKED[fact]}; asked of "
        f"{'all' if len(missing[fact]) == len(runs) else _some(missing[fact])}"
        for fact in _ASKED
        if fact in missing
    }
    if "test_loss" in asked:
        asked["test_loss"] += f"; logged are {', '.join(losses) or 'none'}"
    head = (
        f"{place}: {len(runs)} runs do not say all that is needed; add the options below, and where runs differ one "
        "for each run, or for a pattern of names such as full*, as in --set 'full*:KEY=VALUE'"
    )
    return "\n".join([head, *asked.values()])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def _series(history: Mapping[str, Mapping[int, float]], name: str) -> Mapping[int, float]:
    """Return the metric of this name, or of this name after `train/`; empty if there is none."""
    found = {_plain(key): series for key, series in history.items()}
    # Of transformers, `loss` is that of each step and `train_loss` the mean over all.
    return found.get(name) or found.get(f"train_{name}") or {}


def _facts(run: LoggedRun, notes: dict[str, list[str]]) -> dict[str, Any]:
    """Return the columns of `runs` that are known of a run, None for others; notes tell what its name says."""
    settings = {key.rpartition(".")[2]: value for key, value in run.settings.items()} | run.settings
    settings = {key: value for key, value in settings.items() if value not in (None, "", "NaN", [])}
    facts: dict[str, Any] = {
        fact: next((settings[name] for name in (*names, fact) if name in settings), None)
        for fact, names in _SETTINGS.items()
    }
    name, flags = run.name.lower(), {key: str(value).lower() for key, value in settings.items()}
    in_name = re.search(r"(?<![a-z])(lora|fullft|full|fft)(?![a-z])", name)
    method = str(facts["method"] or (in_name and in_name[1]) or "").lower()
    facts["method"] = _METHODS.get(method, method or None)
    if facts["method"] == "lora":
        variant = "dora" if flags.get("use_dora") == "true" else flags.get("init_lora_weights", "").split("_")[0]
        facts["method"] = variant if variant in ("dora", "pissa", "olora") else "lora"
        facts["alpha_convention"] = {"true": "alpha/sqrt(r)", "false": "alpha/r"}.get(flags.get("use_rslora", ""))
    facts["placement"] = _placement(facts["placement"])
    facts["steps"] = facts["steps"] or max((step for series in run.history.values() for step in series), default=None)
    # A tracker says how a run ended, and transformers how long it was to be.
    planned = float(settings.get("max_steps", 0))
    facts["finished"] = settings.get("State", "finished") == "finished" and float(facts["steps"] or 0) >= planned
    of_device = (settings.get("batch_size"), settings.get("train_batch_size"))
    if facts["batch_size"] in of_device and "gradient_accumulation_steps" in settings:
        facts["batch_size"] = None
    lr, schedule = _peak(_series(run.history, "learning_rate"), int(facts["steps"] or 0))
    facts["lr"] = facts["lr"] or lr
    facts["schedule"] = str(facts["schedule"] or schedule or "unknown").rpartition(".")[2].lower()
    for fact, words in _IN_NAMES.items():
        number = re.search(rf"(?<![a-z])(?:{words})[=_-]?(\d+(?:\.\d+)?(?:e-?\d+)?)(?![a-z\d])", name)
        if facts[fact] is None and number:
            facts[fact] = number[1]
            notes.setdefault(f"{fact} taken from the names of runs", []).append(run.name)
    return facts


def _placement(modules: Any) -> str | None:
    """Return the layers with LoRA by the ends of their names, or None where only a part of them has it."""
    words = set(re.findall(r"[\w-]+", str(modules or "")))
    if any(whole <= words for whole in _WHOLE):
        return "all"
    return next((where for where in ("attn", "mlp") if words and words <= {where, *SUFFIXES[where]}), None)


def _peak(lrs: Mapping[int, float], steps: int) -> tuple[float | None, str | None]:
    """Return the highest learning rate and the schedule that a log of learning rates shows, None where it does not.

    A log of every tenth step lacks the first one, so that the highest value logged is not the highest that there was;
    a line or a cosine through all values tells it. Some versions log the learning rate of the step, others of the next.
    """
    logged = {step: lr for step, lr in lrs.items() if lr > 0}
    if len(logged) < 2:
        return None, None
    for before, (schedule, shape) in product((1, 0), _SHAPES.items()):
        peaks = [lr / shape((step - before) / steps) for step, lr in logged.items() if step < steps + before]
        if len(peaks) > 1 and max(peaks) <= min(peaks) * (1 + 1e-4):
            return float(f"{peaks[0]:.6g}"), schedule
    # A plateau or a log of every step shows the highest itself.
    *_, second, top = sorted(logged.values())
    return (top if len(logged) >= steps - 1 or second == top else None), None


def _losses(history: Mapping[str, Mapping[int, float]], facts: dict[str, Any]) -> list[Mapping[int, float]]:
    """Return the training loss, the test loss and the validation loss by step, and add the final ones to the facts.

    A single evaluation set is the test. Without one, the final training loss is the mean of the last tenth of the log,
    and the fact `test_loss` is True. It is None where there are several of which none is named after the test, or the
    one that a person names is not logged.
    """
    kind = r"(?:eval|validation|valid|val|dev|test)_(?:.+_)?(?:loss|nll)"
    held_out = [key for key, series in history.items() if series and re.fullmatch(kind, _plain(key))]
    tests = [key for key in held_out if "test" in key.lower()] if len(held_out) == 2 else held_out
    train = _series(history, "loss")
    if len(tests) == 1 and facts.get("test_loss") is None:
        others = [key for key in held_out if key not in tests]
        facts |= {"test_loss": tests[0], "validation_loss": next(iter(others), None)}
    test, valid = (history.get(facts.get(name) or "", {}) for name in ("test_loss", "validation_loss"))
    for name, series in (("final_test_nll", test), ("final_valid_nll", valid)):
        facts[name] = series[max(series)] if series else None
    if train and not held_out:
        ends = sorted(train)[-math.ceil(len(train) / 10) :]
        facts["final_train_nll"] = sum(train[step] for step in ends) / len(ends)
    facts["test_loss"] = bool(test or (train and not held_out)) or None
    return [train, test, valid]
