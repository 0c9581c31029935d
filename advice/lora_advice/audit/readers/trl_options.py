"""What the options of transformers' and TRL's configuration classes say, on a command line as in Python."""

from __future__ import annotations

import re
from typing import Any

from lora_advice.audit.config import Task
from lora_advice.audit.readers.options import Options

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


def plain_fields(options: Options, task: Task | None) -> dict[str, Any]:
    """Return the fields of a record that are not what the options of `KEYS` say."""
    steps = options.number("max_steps")
    # Steps count before epochs, also those of a variable that is not known.
    epochs_count = steps is not None and steps <= 0 if "max_steps" in options else True
    length, completion = options.count("max_length max_seq_length"), options.count("max_completion_length")
    if length is None and completion is not None:
        length = completion + (options.count("max_prompt_length") or 0)
    dtype, precision = options.text("dtype torch_dtype") or "", None
    if options.flag("bf16"):
        precision = "bf16"
    elif options.flag("fp16"):
        precision = "fp16"
    return {
        "group_size": options.count("num_generations") if task == "rl" else None,
        "steps": steps if steps is not None and steps > 0 else None,
        "epochs": options.number("num_train_epochs") if epochs_count else None,
        "max_length": length,
        "precision": precision or {"bfloat16": "bf16", "float16": "fp16"}.get(dtype),
        "rounded": dtype == "bfloat16",
    }
