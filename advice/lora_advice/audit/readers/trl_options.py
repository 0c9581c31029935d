"""What the options of transformers' and TRL's configuration classes say, on a command line as in Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_advice.audit.config import Task
from lora_advice.audit.readers.flat import Options

DEFAULT_LRS = {
    "SFTConfig": 2e-5,
    "GRPOConfig": 1e-6,
    "RLOOConfig": 1e-6,
    "DPOConfig": 1e-6,
    "KTOConfig": 1e-6,
    "RewardConfig": 1e-4,
    "TrainingArguments": 5e-5,
    "Seq2SeqTrainingArguments": 5e-5,
}
"""Of TRL 1.16 and transformers 5.24, by class."""
DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
}
"""Of all these classes."""
DEFAULT_GENERATIONS = {"GRPOConfig": 8, "RLOOConfig": 2}
MODEL_CONFIG_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
LORA_CONFIG_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}

FIELDS = {
    "lr": ("learning_rate",),
    "schedule": ("lr_scheduler_type",),
    "warmup": ("warmup_steps", "warmup_ratio"),
    "optimizer": ("optim",),
    "micro_batch": ("per_device_train_batch_size",),
    "accumulation": ("gradient_accumulation_steps",),
    "group_size": ("num_generations",),
    "steps": ("max_steps",),
    "epochs": ("num_train_epochs",),
    "max_length": ("max_length", "max_seq_length", "max_completion_length"),
    "packing": ("packing",),
    "precision": ("bf16", "fp16", "dtype", "torch_dtype"),
}
_TASKS: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("rl", ("grpo", "rloo", "ppo", "gspo", "gmpo", "xpo", "nash", "nashmd", "online", "onlinedpo")),
    ("preference", ("dpo", "kto", "cpo", "orpo", "bco", "tpo", "mpo", "reward", "prm")),
    ("sft", ("sft",)),
)


def task_of(*names: str) -> tuple[Task | None, str]:
    """Return the task by the words of programs, classes or folders, and the word that says it."""
    for name in names:
        class_name = re.sub(r"(Config|Trainer)$", "", name)
        words = re.split(r"[^a-z]+", class_name.lower())
        for task, known in _TASKS:
            for word in known:
                if word in words or (class_name != name and words[-1].endswith(word)):
                    return task, word
    return None, ""


def set_defaults(options: Options, config_class: str) -> None:
    """Set what is not said to the defaults of a class, without a line, which marks a default."""
    if config_class in DEFAULT_LRS:
        defaults = {"learning_rate": DEFAULT_LRS[config_class], **DEFAULTS}
        if config_class in DEFAULT_GENERATIONS:
            defaults["num_generations"] = DEFAULT_GENERATIONS[config_class]
        options.fill(defaults)


def plain_fields(options: Options, task: Task | None) -> tuple[dict[str, Any], dict[str, int]]:
    """Return fields of a record that do not depend on LoRA, and their lines."""
    steps = options.number("max_steps")
    unknown_steps = "max_steps" in options and steps is None
    steps = steps if steps is not None and steps > 0 else None
    warmup = options.number("warmup_steps")
    if not warmup:
        ratio = options.number("warmup_ratio")
        warmup = warmup if ratio is None else ratio
    length = options.count("max_length", "max_seq_length")
    completion = options.count("max_completion_length")
    if length is None and completion is not None:
        length = completion + (options.count("max_prompt_length") or 0)
    fields: dict[str, Any] = {
        "lr": options.number("learning_rate"),
        "schedule": options.text("lr_scheduler_type"),
        "warmup": warmup,
        "optimizer": options.text("optim"),
        "micro_batch": options.count("per_device_train_batch_size"),
        "accumulation": options.count("gradient_accumulation_steps"),
        "group_size": options.count("num_generations") if task == "rl" else None,
        "steps": steps,
        # Steps count before epochs.
        "epochs": options.number("num_train_epochs") if steps is None and not unknown_steps else None,
        "max_length": length,
        "packing": options.flag("packing"),
        "precision": _precision(options),
        "rounded": options.text("dtype", "torch_dtype") == "bfloat16",
    }
    lines = options.lines_of(FIELDS)
    return fields, {name: line for name, line in lines.items() if fields[name] is not None}


def lora_fields(options: Options, keys: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return fields of a record that are about LoRA, from the names under which a program has them."""
    return {
        "rank": options.count(*keys["rank"]),
        "alpha": options.number(*keys["alpha"]),
        "dropout": options.number(*keys["dropout"]),
        "targets": options.names(*keys["targets"]),
        "target_parameters": options.names(*keys["target_parameters"]) or (),
        "saved_modules": options.names(*keys["saved_modules"]) or (),
        "rslora": bool(options.flag(*keys["rslora"])),
        "dora": bool(options.flag(*keys["dora"])),
    }


def _precision(options: Options) -> str | None:
    if options.flag("bf16"):
        return "bf16"
    if options.flag("fp16"):
        return "fp16"
    dtype = options.text("dtype", "torch_dtype")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(dtype or "")
