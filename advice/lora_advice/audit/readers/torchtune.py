"""Configurations of torchtune's recipes. What is not in them, such as the number of devices, is on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import defaults, examples, names_of, read_yaml, record


def matches(path: Path, text: str) -> bool:
    """Return whether a file names components of torchtune and an optimizer."""
    has_optimizer = re.search(r"^[ \t]*optimizer\s*:", text, re.MULTILINE) is not None
    return path.suffix in (".yml", ".yaml") and "_component_: torchtune." in text and has_optimizer


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    # The framework reads files with OmegaConf, to which 2e-4 is a number.
    options = read_yaml(text, as_omegaconf=True).resolved()
    # In asynchronous RL, what concerns training has a section of its own.
    training = "training." if options.has("training.optimizer") else ""
    role = next((key for key in ("model", "policy_model") if options.text(f"{key}._component_")), None)
    if role is None or not options.has(f"{training}optimizer"):
        return []
    keys = {field: f"{training}{name} {name}" for field, name in names_of("torchtune").items()}
    # What is said of the model is below `model`, or `policy_model` in PPO.
    keys |= {field: f"{role}.{name}" for field, name in names_of("torchtune_model").items()}
    # The last parts of the names of components, such as `lora_llama3_8b`.
    builder, loss, scheduler, optimizer = (
        (options.text(keys[field]) or "").rpartition(".")[2] for field in ("model", "task", "schedule", "optimizer")
    )
    task: Task = "rl" if "GRPO" in loss or "PPO" in loss else "sft"
    if any(name in loss for name in ("DPO", "RSO", "SimPO")):
        task = "preference"
    method: Method | None = "lora" if builder.startswith(("lora_", "qlora_")) else "fullft"
    if options.get(f"{role}.decoder_trainable") in (False, "frozen"):
        # A model of text and pictures says for each part what is trained; with a frozen decoder it is neither.
        method = None
    if method == "lora":
        options.fill({f"{role}.{name}": value for name, value in defaults()["torchtune"].items()})
    model: str | None = re.sub(r"^q?lora_", "", builder)
    # A builder without a size, such as `llama2`, has its sizes in further options.
    if not re.search(r"\d+b|mini", str(model)):
        folder = options.text("training.checkpointer.checkpoint_dir checkpointer.checkpoint_dir")
        model = None if folder is None else folder.rstrip("/")
    batch: dict[str, Any] = {"global_batch": None, "group_size": None, "steps": None}
    if task == "rl":
        group = options.count(keys["group_size"])
        if options.count(keys["global_batch"]):
            # PPO: `batch_size` counts the responses of a rollout, and `num_steps` all responses.
            batch = {"epochs": None, "group_size": group, "micro_batch": None, "accumulation": None, "steps": None}
        else:
            # In GRPO `batch_size` counts prompts.
            prompts = options.count(keys["micro_batch"])
            micro = prompts if prompts is None or group is None else prompts * group
            steps = options.number(keys["steps"])
            batch = {"epochs": None, "global_batch": None, "micro_batch": micro, "steps": steps}
    elif task == "sft" and not options.flag("dataset.packed"):
        batch["examples"] = examples(path, options.get("dataset.data_files"))
    # The names of transformers are what other parts of the audit know.
    targets = ["o_proj" if name == "output_proj" else name for name in options.names(keys["targets"]) or ()]
    mlp = bool(options.flag(f"{role}.apply_lora_to_mlp"))
    if mlp:
        targets += ["gate_proj", "up_proj", "down_proj"]
    if options.flag(f"{role}.apply_lora_to_output"):
        targets.append("lm_head")
    return [
        record(
            shown,
            "torchtune",
            options,
            keys,
            lora=method == "lora",
            task=task,
            method=method,
            model=model,
            bits=4 if builder.startswith("qlora_") or options.flag(keys["bits"]) else None,
            rounded=options.text(keys["rounded"]) == "bf16",
            schedule=re.sub(r"^get_|_schedule_with_warmup$", "", scheduler) or "constant",
            optimizer=optimizer or None,
            targets=tuple(targets),
            # The builder of Llama 4 gives each expert LoRA of its own.
            target_parameters=("experts.gate_up_proj", "experts.down_proj") if mlp and "llama4" in builder else (),
            **batch,
        )
    ]
