"""Configurations of torchtune's recipes. What is not in them, such as the number of devices, is on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import examples, frameworks, read_yaml, record
from lora_advice.audit.readers.values import count, flag, names, number, text


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    # The framework reads files with OmegaConf.
    options, table = read_yaml(content, as_omegaconf=True), frameworks()["torchtune"]
    role = next((key for key in ("model", "policy_model") if text(options[f"{key}._component_"])), None)
    # In asynchronous RL, what concerns training has a section of its own.
    training = "training." if options.has("training.optimizer") else ""
    if role is None or not options.has(f"{training}optimizer"):
        return []
    keys = {field: f"{training}{name} {name}" for field, name in table["names"].items()}
    keys |= {field: f"{role}.{name}" for field, name in table["model_names"].items()}
    # The last parts of the names of components, such as `lora_llama3_8b`.
    builder, loss, scheduler, optimizer = (
        (text(options[keys[field]]) or "").rpartition(".")[2] for field in ("model", "task", "schedule", "optimizer")
    )
    task: Task = "rl" if "GRPO" in loss or "PPO" in loss else "sft"
    if any(name in loss for name in ("DPO", "RSO", "SimPO")):
        task = "preference"
    method: Method | None = "lora" if builder.startswith(("lora_", "qlora_")) else "fullft"
    if options[f"{role}.decoder_trainable"] in (False, "frozen"):
        # A model of text and pictures says for each part what is trained; with a frozen decoder it is neither.
        method = None
    if method == "lora":
        options.fill({f"{role}.{name}": value for name, value in table["defaults"].items()})
    model: str | None = re.sub(r"^q?lora_", "", builder)
    # A builder without a size, such as `llama2`, has its sizes in further options.
    if not re.search(r"\d+b|mini", str(model)):
        folder = text(options["training.checkpointer.checkpoint_dir checkpointer.checkpoint_dir"])
        model = None if folder is None else folder.rstrip("/")
    batch: dict[str, Any] = {"global_batch": None, "group_size": None, "steps": None}
    if task == "rl":
        batch = {"epochs": None}
        if count(options[keys["global_batch"]]):
            # PPO: `batch_size` counts the responses of a rollout, and `num_steps` all responses.
            batch |= {"micro_batch": None, "accumulation": None, "steps": None}
        else:
            # In GRPO `batch_size` counts prompts.
            prompts, group = count(options[keys["micro_batch"]]), count(options[keys["group_size"]])
            micro = prompts if prompts is None or group is None else prompts * group
            batch |= {"global_batch": None, "micro_batch": micro, "steps": number(options[keys["steps"]])}
    elif task == "sft" and not flag(options["dataset.packed"]):
        batch["examples"] = examples(path, options["dataset.data_files"])
    # The names of transformers are what other parts of the audit know.
    targets = ["o_proj" if name == "output_proj" else name for name in names(options[keys["targets"]]) or ()]
    mlp = flag(options[f"{role}.apply_lora_to_mlp"])
    targets += ["gate_proj", "up_proj", "down_proj"] if mlp else []
    targets += ["lm_head"] if flag(options[f"{role}.apply_lora_to_output"]) else []
    return [
        record(
            path,
            "torchtune",
            options,
            keys,
            lora=method == "lora",
            task=task,
            method=method,
            model=model,
            bits=4 if builder.startswith("qlora_") or flag(options[keys["bits"]]) else None,
            rounded=text(options[keys["rounded"]]) == "bf16",
            schedule=re.sub(r"^get_|_schedule_with_warmup$", "", scheduler) or "constant",
            optimizer=optimizer or None,
            targets=tuple(targets),
            # The builder of Llama 4 gives each expert LoRA of its own.
            target_parameters=("experts.gate_up_proj", "experts.down_proj") if mlp and "llama4" in builder else (),
            **batch,
        )
    ]
