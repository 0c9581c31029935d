"""Finished adapters: a folder with PEFT's `adapter_config.json`, and what lies beside it of the run that made it.

That is, in this order: the record of a run of this project, `training_args.json` or `args.json`, the hyperparameters of
the model card that Hugging Face's Trainer writes, and `trainer_state.json`, in the folder or in its last checkpoint.
`training_args.bin` is a pickle and is never loaded. What another file than `adapter_config.json` says has line 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_advice.adapter_config import NAME, OtherMethodError, parse_adapter
from lora_advice.audit.config import Method, TrainingConfig
from lora_advice.audit.readers.options import CERTAIN, THE_FILE, Options, flatten, names_of, read_yaml, record
from lora_advice.audit.readers.trl_options import plain_fields, task_of
from lora_advice.errors import UserError
from lora_advice.finding import Finding

_OTHER_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "layer_replication")
"""Options that alter where LoRA is, or how large, and that a record does not hold."""
_CARD = {
    "learning_rate": "learning_rate",
    "train_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_devices": "num_devices",
    "lr_scheduler_type": "lr_scheduler_type",
    "lr_scheduler_warmup_steps": "warmup_steps",
    "lr_scheduler_warmup_ratio": "warmup_ratio",
    "training_steps": "max_steps",
    "num_epochs": "num_train_epochs",
}
"""Hyperparameters of a model card by the names that the Trainer has for them."""


def matches(path: Path, text: str) -> bool:
    """Return whether a file is the configuration of an adapter."""
    return path.name == NAME


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run that made an adapter."""
    options, findings = Options(), list[Finding]()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r'\s*"(\w+)"\s*:', line):
            options.lines.setdefault(match[1], number)

    def not_read(message: str, sure: str = CERTAIN, name: str = "") -> None:
        findings.append(Finding("not-read", "note", message, THE_FILE, sure, line=options.lines.get(name)))

    method: Method | None = None
    try:
        adapter = parse_adapter(text, path.name)
    except OtherMethodError as error:
        not_read(f"{error}, so no check is about it", name="peft_type")
    else:
        method, options.values = "lora", adapter.model_dump(exclude_none=True)
        if isinstance(adapter.target_modules, tuple):
            options.values["target_modules"] = adapter.targets
        if others := [name for name in _OTHER_PATTERNS if options.get(name)]:
            message = f"{', '.join(others)} of the adapter is not known to the checks, which take its rank and modules"
            not_read(message, name=others[0])
    keys = {**names_of("peft"), "model": "base_model_name_or_path"}
    run = _of_record(_beside(path.parent.parent / "record.json", not_read)) or _of_trainer(path.parent, not_read)
    for field, value in run.items():
        options.set(f"run.{field}", value, 1)
        keys[field] = f"run.{field}"
    if run.get("lr") is None and (path.parent / "training_args.bin").is_file():
        not_read("training_args.bin may say the learning rate, but is a pickle, which could run code and is not read")
    said = {field: run[field] for field in ("task", "bits", "rounded") if field in run}
    return [record(shown, "peft", options, keys, findings, method=method, **said)]


def _of_record(found: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the record of a run of this project says, whose learning rate is constant."""
    if not isinstance(found.get("spec"), dict) or "run_id" not in found:
        return {}
    options = Options(flatten(found["spec"]))
    method = options.text("method")
    fields = {
        "task": "rl" if options.text("task") == "rl" else "sft",
        "bits": 4 if method == "qlora" else None,
        "lr": options.number("lr"),
        "lr_ratio": options.number("lr_ratio"),
        "schedule": "constant",
        "optimizer": "adam",
        "global_batch": options.count("batch_size"),
        "steps": options.number("steps"),
        "precision": options.text("protocol.precision"),
    }
    if method in ("pissa", "olora"):
        # They are saved as LoRA of twice the rank.
        fields |= {"variant": method, "rank": options.count("rank"), "alpha": options.number("alpha")}
    return fields


def _of_trainer(folder: Path, not_read: Callable[..., None]) -> dict[str, Any]:
    """Return the fields that the files of Hugging Face's Trainer beside an adapter say."""
    options, tags = _card(folder / "README.md", not_read)
    for name in ("args.json", "training_args.json"):
        options.update(Options(_beside(folder / name, not_read)))
    task, _ = task_of(*tags)
    state = Options(_state(folder, not_read))
    fields = options.fields(names_of("trl")) | plain_fields(options, task)
    fields |= {"task": task, "devices": options.count("num_devices world_size")}
    if steps := state.count("global_step"):
        fields |= {"steps": float(steps), "epochs": state.number("epoch")}
    if fields["micro_batch"] is None:
        fields["micro_batch"] = state.count("train_batch_size")
    return fields if fields["lr"] is not None else fields | _logged_lr(state, not_read)


def _beside(path: Path, not_read: Callable[..., None]) -> dict[str, Any]:
    """Return the object in a JSON file beside the adapter; empty if there is none, or if it can't be read."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        reason = "it has no options: it is not a mapping"
    except OSError as error:
        data, reason = None, str(error)
    except (ValueError, RecursionError) as error:
        data, reason = None, f"it is not valid JSON: {error}"
    if isinstance(data, dict):
        return data
    not_read(f"{path.name} could not be read: {reason}")
    return {}


def _state(folder: Path, not_read: Callable[..., None]) -> dict[str, Any]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    last = sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))[-1:]
    states = (_beside(place / "trainer_state.json", not_read) for place in (folder, *last))
    return next(filter(None, states), {})


def _card(path: Path, not_read: Callable[..., None]) -> tuple[Options, list[str]]:
    """Return the hyperparameters of a model card, by the Trainer's names, and its tags."""
    options, tags = Options(), list[str]()
    if not path.is_file():
        return options, tags
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        not_read(f"README.md could not be read: {error}")
        return options, tags
    if head := re.match(r"---\n(.*?)\n---\n", text, re.DOTALL):
        try:
            said = read_yaml(head[1]).get("tags")
            tags = [tag for tag in said if isinstance(tag, str)] if isinstance(said, list) else []
        except UserError as error:
            not_read(f"the head of README.md: {error}")
    section = re.search(r"^#+ Training hyperparameters\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    for name, value in re.findall(r"^- (\w+): (.+)$", section[1] if section else "", re.MULTILINE):
        if name in _CARD:
            options.set(_CARD[name], value)
        elif name == "optimizer" and (optimizer := re.match(r"(?:Use )?(\S+)", value)):
            options.set("optim", optimizer[1].rpartition(".")[2].lower())  # of `OptimizerNames.ADAMW_TORCH`
        elif name == "mixed_precision_training" and value == "Native AMP":
            options.set("fp16", True)
    return options, tags


def _logged_lr(state: Options, not_read: Callable[..., None]) -> dict[str, Any]:
    """Return the highest learning rate in the log of the Trainer."""
    log = state.get("log_history")
    entries = [Options(entry) for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    logged = [(lr, entry.count("step")) for entry in entries if (lr := entry.number("learning_rate")) is not None]
    if not logged:
        return {}
    highest, step = max(logged, key=lambda item: item[0])
    if len(logged) > 1 and all(lr == highest for lr, _ in logged):
        return {"lr": highest, "schedule": "constant"}
    message = f"the learning rate {highest:g} is the highest that trainer_state.json logged (step {step})"
    not_read(f"{message}; its peak may be higher", "at least this")
    return {"lr": highest}
