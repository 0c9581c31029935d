"""Finished adapters: a folder with PEFT's `adapter_config.json`, and what lies beside it of the run that made it.

That is, in this order: the record of a run of this project, `training_args.json` or `args.json`, the hyperparameters of
the model card that Hugging Face's Trainer writes, and `trainer_state.json`, in the folder or in its last checkpoint.
`training_args.bin` is a pickle and is never loaded. What another file than `adapter_config.json` says has line 1.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_advice.adapter_config import NAME, AdapterConfig, OtherMethodError, parse_adapter
from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.flat import Options
from lora_advice.audit.readers.options import CERTAIN, THE_FILE, checked, variant_of
from lora_advice.audit.readers.trl_options import plain_fields, task_of
from lora_advice.audit.yaml_lines import load
from lora_advice.errors import UserError
from lora_advice.finding import Finding

KEYS = {
    "model": ("base_model_name_or_path",),
    "rank": ("r",),
    "alpha": ("lora_alpha",),
    "dropout": ("lora_dropout",),
    "targets": ("target_modules",),
    "target_parameters": ("target_parameters",),
    "saved_modules": ("modules_to_save",),
    "rslora": ("use_rslora",),
    "dora": ("use_dora",),
    "variant": ("init_lora_weights",),
}
OTHER_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "layer_replication")
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
    return path.name == NAME


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run that made an adapter."""
    options = Options()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r'\s*"(\w+)"\s*:', line):
            options.lines.setdefault(match[1], number)
    findings = []
    fields: dict[str, Any] = {"method": None}
    try:
        adapter = parse_adapter(text, path.name)
    except OtherMethodError as error:
        message = f"{error}, so no check is about it"
        findings.append(Finding("not-read", "note", message, THE_FILE, CERTAIN, line=options.lines.get("peft_type")))
    else:
        options.values = adapter.model_dump(exclude_none=True)
        fields = _lora(adapter, options)
        others = [name for name in OTHER_PATTERNS if options.get(name)]
        if others:
            message = f"{', '.join(others)} of the adapter is not known to the checks, which take its rank and modules"
            findings.append(Finding("not-read", "note", message, THE_FILE, CERTAIN, line=options.lines.get(others[0])))
    about, lines = _run(path.parent, findings), options.lines_of(KEYS)
    fields |= about
    lines = {field: line for field, line in lines.items() if fields.get(field)}
    lines |= {field: 1 for field, value in about.items() if value is not None}
    if fields.get("lr") is None and (path.parent / "training_args.bin").is_file():
        message = "training_args.bin may say the learning rate, but is a pickle, which could run code and is not read"
        findings.append(Finding("not-read", "note", message, THE_FILE, CERTAIN))
    config = TrainingConfig(shown, "peft", lines=lines, findings=tuple(findings), **fields)
    return [checked(config, options.said(KEYS))]


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError("it has no options: it is not a mapping")
    return data


def _lora(config: AdapterConfig, options: Options) -> dict[str, Any]:
    method: Method = "lora"
    return {
        "method": method,
        "model": options.text("base_model_name_or_path"),
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "targets": (config.targets,) if isinstance(config.targets, str) else config.targets,
        "target_parameters": config.target_parameters or (),
        "saved_modules": config.modules_to_save or (),
        "rslora": bool(config.use_rslora),
        "dora": bool(config.use_dora),
        "variant": variant_of(options.text("init_lora_weights")),
    }


def _run(folder: Path, findings: list[Finding]) -> dict[str, Any]:
    """Return the fields that the files beside an adapter say; adds to the findings what could not be read."""
    record = _beside(folder.parent / "record.json", findings)
    if isinstance(record.get("spec"), dict) and "run_id" in record:
        return _of_record(record["spec"])
    card, tags = _card(folder / "README.md", findings)
    for name in ("args.json", "training_args.json"):
        card.update(Options(_beside(folder / name, findings)))
    task, _ = task_of(*tags)
    fields, _ = plain_fields(card, task)
    fields |= {"task": task, "devices": card.count("num_devices", "world_size")}
    state = Options(_state(folder, findings))
    if steps := state.count("global_step"):
        fields |= {"steps": float(steps), "epochs": state.number("epoch")}
    if fields["micro_batch"] is None:
        fields["micro_batch"] = state.count("train_batch_size")
    if fields["lr"] is None:
        fields |= _logged_lr(state, findings)
    return fields


def _of_record(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run of this project, whose learning rate is constant."""
    options = Options(spec)
    task: Task = "rl" if spec.get("task") == "rl" else "sft"
    protocol, method, variant = spec.get("protocol"), options.text("method"), dict[str, Any]()
    if method in ("pissa", "olora"):
        # They are saved as LoRA of twice the rank.
        variant = {"variant": method, "rank": options.count("rank"), "alpha": options.number("alpha")}
    return variant | {
        "bits": 4 if method == "qlora" else None,
        "lr_ratio": options.number("lr_ratio"),
        "task": task,
        "lr": options.number("lr"),
        "schedule": "constant",
        "optimizer": "adam",
        "global_batch": options.count("batch_size"),
        "steps": options.number("steps"),
        "precision": Options(protocol).text("precision") if isinstance(protocol, dict) else None,
    }


def _beside(path: Path, findings: list[Finding]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, UserError) as error:
        findings.append(Finding("not-read", "note", f"{path.name} could not be read: {error}", THE_FILE, CERTAIN))
        return {}


def _state(folder: Path, findings: list[Finding]) -> dict[str, Any]:
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    checkpoints.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")))
    for place in (folder, *checkpoints[-1:]):
        if state := _beside(place / "trainer_state.json", findings):
            return state
    return {}


def _card(path: Path, findings: list[Finding]) -> tuple[Options, list[str]]:
    """Return the hyperparameters of a model card, by the Trainer's names, and its tags."""
    options = Options()
    if not path.is_file():
        return options, []
    tags: list[str] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        findings.append(Finding("not-read", "note", f"README.md could not be read: {error}", THE_FILE, CERTAIN))
        return options, tags
    if head := re.match(r"---\n(.*?)\n---\n", text, re.DOTALL):
        try:
            data, _ = load(head[1])
        except UserError as error:
            findings.append(Finding("not-read", "note", f"the head of README.md: {error}", THE_FILE, CERTAIN))
            data = None
        said = data.get("tags") if isinstance(data, dict) else None
        tags = [tag for tag in said if isinstance(tag, str)] if isinstance(said, list) else []
    section = re.search(r"^#+ Training hyperparameters\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    for name, value in re.findall(r"^- (\w+): (.+)$", section[1] if section else "", re.MULTILINE):
        if name in _CARD:
            options.set(_CARD[name], value)
        elif name == "optimizer" and (optimizer := re.match(r"(?:Use )?(\S+)", value)):
            options.set("optim", optimizer[1].rpartition(".")[2].lower())  # of `OptimizerNames.ADAMW_TORCH`
        elif name == "mixed_precision_training" and value == "Native AMP":
            options.set("fp16", True)
    return options, tags


def _logged_lr(state: Options, findings: list[Finding]) -> dict[str, Any]:
    """Return the highest learning rate in the log of the Trainer."""
    log = state.get("log_history")
    entries = [Options(entry) for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    logged = [(lr, entry.count("step")) for entry in entries if (lr := entry.number("learning_rate")) is not None]
    if not logged:
        return {}
    highest, step = max(logged, key=lambda item: item[0])
    if len(logged) > 1 and all(lr == highest for lr, _ in logged):
        return {"lr": highest, "schedule": "constant"}
    message = (
        f"the learning rate {highest:g} is the highest that trainer_state.json logged (step {step}); its peak may be"
    )
    findings.append(Finding("not-read", "note", f"{message} higher", THE_FILE, "at least this"))
    return {"lr": highest}
