"""Runs as the logs of other trainers have them, made into the tidy tables.

Trainers and trackers call one thing by many names. What a run's settings do not say is looked for in its log of
learning rates, in its speeds, and in its name; what is still unknown is asked for, all at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorabench.config.fields import SUFFIXES
from lorabench.errors import UserError
from lorabench.sources.source import refuse_repeats
from lorabench.store.checks import check_curves, check_table
from lorabench.store.io import typed_columns
from lorabench.store.schemas import RUNS
from lorabench.store.tables import TRAINING_LOSS, Tables, with_stand_ins

_SETTINGS = {
    "model": ("base_model_name_or_path", "model_name_or_path", "base_model", "_name_or_path", "model_name"),
    "dataset": ("dataset_name", "datasets", "dataset_id"),
    "method": ("finetuning_type", "peft_type"),
    "rank": ("lora_r", "lora_rank", "r"),
    "alpha": ("lora_alpha",),
    "placement": ("target_modules", "lora_target_modules", "lora_target"),
    "lr": ("learning_rate",),
    "batch_size": ("total_train_batch_size", "global_batch_size", "effective_batch_size"),
    "seed": ("random_seed",),
    "schedule": ("lr_scheduler_type", "lr_scheduler"),
    "family": ("model_type",),
    "hidden_size": (),
}
"""The names that settings have elsewhere, beside that of the column of `runs`; the first that a run has counts."""

_METHODS = {"lora": "lora", "true": "lora", **dict.fromkeys(("full", "fullft", "fft", "false"), "fullft")}

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

_IN_NAMES = {"lr": "learning_rate|lr", "seed": "seed|s", "rank": "rank|r", "alpha": "alpha", "batch_size": "batch|bs"}
_NUMBER = r"[=_-]?(\d+(?:\.\d+)?(?:e-?\d+)?)(?![a-z\d])"

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
    finished: bool = True


def tidy_tables(runs: Sequence[LoggedRun], said: Sequence[str], place: Path) -> tuple[Tables, list[str]]:
    """Return the tables `runs` and `curves` of logged runs, and sentences on how they were read.

    `said` has lines KEY=VALUE or RUN:KEY=VALUE, with which a person says a column of `runs`, `test_loss` or
    `validation_loss` (the name of a logged loss) of all runs or of those whose names a pattern fits. UserError lists
    everything that is not known, says that a line is wrong, that a run is of reinforcement learning, that runs are
    alike, or what `check_table` and `check_curves` do.
    """
    rows, points, notes, missing = [], [], dict[str, list[str]](), dict[str, list[str]]()
    patterns = [_said(line, [run.name for run in runs], place) for line in said]
    for run in runs:
        if {"reward", "train_reward"} & set(map(_plain, run.history)):
            raise UserError(f"{place}: {run.name} logs rewards; allowed: runs of supervised fine-tuning")
        facts = _facts(run, notes) | {key: value for key, value, names in patterns if run.name in names}
        facts |= {"run_id": run.name, "task": "sft"}
        lora = facts["method"] != "fullft"
        facts |= {} if lora else dict.fromkeys(("rank", "alpha", "placement"))
        by_split = _losses(run.history, facts)
        for fact in list(_ASKED)[: None if lora else -3]:
            if facts.get(fact) is None:
                missing.setdefault(fact, []).append(run.name)
        final = _final(by_split)
        facts["status"] = "done" if all(map(math.isfinite, final.values())) else "diverged"
        if not run.finished and facts["status"] == "done":
            notes.setdefault("left out, since they did not reach their last step", []).append(run.name)
            continue
        rows.append(facts | final)
        held_out = by_split.get("test") or by_split.get("validation")
        if held_out is None:
            notes.setdefault(TRAINING_LOSS, []).append(run.name)
        elif max(held_out) < max(max(series) for series in by_split.values()):
            notes.setdefault("last evaluated before the last step", []).append(run.name)
        for split, series in (by_split | {"grad_norm": _series(run.history, "grad_norm")}).items():
            named = ("train", split) if split == "grad_norm" else (split, "nll")
            points += [(run.name, step, *named, value) for step, value in series.items()]
    if missing:
        raise UserError("\n".join(_questions(missing, runs, place)))
    known = [name for name in RUNS.names if any(row.get(name) is not None for row in rows)]
    table = typed_columns(pd.DataFrame(rows, columns=known), "runs", place)
    refuse_repeats(table, place)
    curves = pd.DataFrame(points, columns=["run_id", "step", "split", "metric", "value"])
    curves = curves[curves["run_id"].isin(table["run_id"])]
    curves["examples"] = curves["step"] * curves["run_id"].map(table.set_index("run_id")["batch_size"])
    curves = typed_columns(curves.assign(value=curves["value"].where(np.isfinite(curves["value"]))), "curves", place)
    try:
        check_table(with_stand_ins(table))
        check_curves(curves)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return Tables(table, curves.reset_index(drop=True)), [f"{what}: {_some(names)}" for what, names in notes.items()]


def _said(line: str, names: Sequence[str], place: Path) -> tuple[str, str, list[str]]:
    """Return the key and the value that a line says, and the names of the runs of which it says it."""
    parts = re.fullmatch(r"(?:(.*?):)??(\w+)=(.+)", line)
    if parts is None or parts[2] not in (*RUNS.names, "test_loss", "validation_loss"):
        raise UserError(f"--set {line!r}: allowed: KEY=VALUE or RUN:KEY=VALUE, with a KEY such as {', '.join(_ASKED)}")
    chosen = [name for name in names if parts[1] is None or fnmatchcase(name, parts[1])]
    if not chosen:
        raise UserError(f"--set {line!r}: no run of {place} has this name; allowed: {_some(names)}")
    return parts[2], parts[3], chosen


def _final(by_split: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return the last losses of a run: of the test, and where it has two evaluation sets of the validation.

    Without either there is the mean training loss of the last tenth of what was logged, in nats per token.
    """
    if not {"test", "validation"} & set(by_split):
        values = list(by_split.get("train", {}).values())
        return {"final_train_nll": float(np.mean(values[-max(1, len(values) // 10) :]))} if values else {}
    last = {split: series[max(series)] for split, series in by_split.items()}
    if "test" not in last:
        return {"final_test_nll": last["validation"]}
    return {"final_valid_nll": last["validation"], "final_test_nll": last["test"]}


def _questions(missing: Mapping[str, Sequence[str]], runs: Sequence[LoggedRun], place: Path) -> list[str]:
    """Return the lines that ask for everything that is missing, each with the option that says it."""
    lines = [
        f"{place}: {len(runs)} runs do not say all that is needed; add the options below, and where runs differ in it "
        "one for each RUN, or pattern such as full*, as in --set 'RUN:KEY=VALUE'"
    ]
    for fact, names in missing.items():
        of = "all runs" if len(names) == len(runs) else _some(names)
        lines.append(f"  --set {fact}={_ASKED[fact]}; asked of {of}")
    losses = sorted({key for run in runs for key in run.history if "loss" in key.lower()})
    return [*lines, f"  logged losses: {', '.join(losses) or 'none'}"] if "test_loss" in missing else lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower())


def _series(history: Mapping[str, Mapping[int, float]], *names: str) -> Mapping[int, float]:
    """Return the first metric that has one of these names, perhaps after `train/`; empty if there is none."""
    found = {_plain(key): series for key, series in history.items() if series}
    return next(
        (found[f"{start}{name}"] for name in names for start in ("train_", "") if f"{start}{name}" in found), {}
    )


def _facts(run: LoggedRun, notes: dict[str, list[str]]) -> dict[str, Any]:
    """Return the columns of `runs` that are known of a run, None for others; notes tell what its name says."""
    settings = {key.rpartition(".")[2]: value for key, value in run.settings.items()} | dict(run.settings)
    settings = {key: value for key, value in settings.items() if value not in (None, "", [])}
    facts: dict[str, Any] = {
        fact: next((settings[name] for name in (*names, fact) if name in settings), None)
        for fact, names in _SETTINGS.items()
    }
    name = run.name.lower()
    method = facts["method"] or next((settings[key] for key in ("use_peft", "use_lora") if key in settings), None)
    if method is None:
        method = next((word for word in _METHODS if re.search(rf"(?<![a-z]){word}(?![a-z])", name)), None)
    start = str(settings.get("init_lora_weights")).lower().partition("_")[0]
    facts["method"] = _METHODS.get(str(method).lower(), method)
    if facts["method"] == "lora":
        variant = "dora" if str(settings.get("use_dora")).lower() == "true" else start
        facts["method"] = variant if variant in ("dora", "pissa", "olora") else "lora"
        if "use_rslora" in settings:
            rooted = str(settings["use_rslora"]).lower() == "true"
            facts["alpha_convention"] = "alpha/sqrt(r)" if rooted else "alpha/r"
    facts["placement"] = _placement(facts["placement"])
    facts["steps"] = max((step for series in run.history.values() for step in series), default=0) or None
    if "gradient_accumulation_steps" in settings and facts["batch_size"] == settings.get("batch_size"):
        # A number beside accumulated steps may be that of a micro-batch.
        facts["batch_size"] = None
    facts["batch_size"] = facts["batch_size"] or _batch_size(run, settings, facts["steps"])
    lr, schedule = _peak(_series(run.history, "learning_rate"), facts["steps"])
    facts["lr"] = facts["lr"] or lr
    facts["schedule"] = str(facts["schedule"]).rpartition(".")[2].lower() if facts["schedule"] else schedule
    for fact, words in _IN_NAMES.items():
        if facts[fact] is None and (number := re.search(rf"(?<![a-z])(?:{words}){_NUMBER}", name)):
            facts[fact] = number[1]
            notes.setdefault(f"{fact} taken from the names of runs", []).append(run.name)
    return facts


def _placement(modules: Any) -> str | None:
    """Return the layers with LoRA by the ends of their names, or None where only a part of them has it."""
    words = set(re.findall(r"[\w-]+", str(modules or "")))
    if any(whole <= words for whole in _WHOLE):
        return "all"
    return next((where for where in ("attn", "mlp") if words and words <= {where, *SUFFIXES[where]}), None)


def _batch_size(run: LoggedRun, settings: Mapping[str, Any], steps: int | None) -> int | None:
    """Return the examples per step by the speeds that transformers logs at the end, if they leave one answer.

    They give the mean number of examples of a step. The last step of an epoch may have fewer than the others, each of
    which has a multiple of the examples of a device.
    """
    names = ("train_samples_per_second", "train_runtime", "epoch")
    speed, seconds, epochs = (max(_series(run.history, name).values(), default=0.0) for name in names)
    unit = int(settings.get("per_device_train_batch_size", 0)) * int(settings.get("gradient_accumulation_steps", 1))
    if not (steps and speed * seconds * epochs * unit):
        return None
    mean, per_epoch = speed * seconds / steps, steps / epochs
    most = mean * per_epoch / max(0.5, per_epoch - 1)
    fitting = [size for size in range(unit, math.ceil(most) + 1, unit) if size >= 0.998 * mean]
    return fitting[0] if len(fitting) == 1 else None


def _peak(lrs: Mapping[int, float], steps: int | None) -> tuple[float | None, str | None]:
    """Return the highest learning rate and the schedule that a log of learning rates shows, None where it does not.

    A log of every tenth step lacks the first one, so that the highest value logged is not the highest that there was;
    a line or a cosine through all values tells it. Some versions log the learning rate of the step, others of the next.
    """
    logged = {step: lr for step, lr in lrs.items() if lr > 0}
    if len(logged) > 1 and steps:
        for before in (1, 0):
            done = {step: (step - before) / steps for step in logged if step < steps + before}
            for schedule, shape in _SHAPES.items():
                peaks = [logged[step] / shape(share) for step, share in done.items()]
                if max(peaks) <= min(peaks) * (1 + 1e-4):
                    return float(f"{peaks[0]:.6g}"), schedule
        top = max(logged.values())
        if len(logged) >= steps - 1 or list(logged.values()).count(top) > 1:
            return top, None
    return None, None


def _losses(history: Mapping[str, Mapping[int, float]], facts: dict[str, Any]) -> dict[str, Mapping[int, float]]:
    """Return the losses by split, and complete `test_loss` and `validation_loss` among the facts.

    A single evaluation set stands for the test, and its curve for that of the validation split, whose losses curves are
    compared by. Without one there is the training loss alone.
    """
    names = {_plain(key): key for key, series in history.items() if series}
    kind = "eval|validation|valid|val|dev|test"
    held_out = [key for name, key in names.items() if re.fullmatch(rf"(?:{kind})_(?:.+_)?(?:loss|nll)", name)]
    tests = [key for key in held_out if "test" in key.lower()] if len(held_out) == 2 else held_out
    train = _series(history, "loss", "nll")
    if not held_out and train:
        facts.setdefault("test_loss", "")
    if facts.get("test_loss") is None and len(tests) == 1:
        facts["test_loss"] = tests[0]
        facts.setdefault("validation_loss", next((key for key in held_out if key not in tests), None))
    test, valid = (history.get(facts.get(name) or "", {}) for name in ("test_loss", "validation_loss"))
    by_split = {"train": train, "validation": valid or test, "test": test if valid else {}}
    return {split: series for split, series in by_split.items() if series}
