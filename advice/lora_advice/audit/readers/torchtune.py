"""Configurations of torchtune's recipes. What is not in them, such as the number of devices, is on the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import Options, defaults, examples, names_of, read_yaml, record


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
    builder = _component(options, keys["model"]) or ""
    loss = _component(options, keys["task"]) or ""
    task: Task = "rl" if "GRPO" in loss or "PPO" in loss else "sft"
    if any(name in loss for name in ("DPO", "RSO", "SimPO")):
        task = "preference"
    method: Method | None = "lora" if builder.startswith(("lora_", "qlora_")) else "fullft"
    if options.get(f"{role}.decoder_trainable") in (False, "frozen"):
        # A model of text and pictures says for each part what is trained; with a frozen decoder it is neither.
        method = None
    if method == "lora":
        options.fill({f"{role}.{name}": value for name, value in defaults()["torchtune"].items()})
    precision, packing = options.text(keys["precision"]), bool(options.flag(keys["packing"]))
    schedule = re.sub(r"^get_|_schedule_with_warmup$", "", _component(options, keys["schedule"]) or "")
    batch: dict[str, Any] = {"global_batch": None, "group_size": None, "steps": None}
    if task == "rl":
        batch = _rl_batch(options, keys)
    elif task == "sft" and not packing:
        batch["examples"] = examples(path, options.get("dataset.data_files"))
    mlp = bool(options.flag(f"{role}.apply_lora_to_mlp"))
    return [
        record(
            shown,
            "torchtune",
            options,
            keys,
            options.set_twice("OmegaConf, which reads it, refuses the file"),
            lora=method == "lora",
            task=task,
            method=method,
            model=_model(builder, options),
            bits=4 if builder.startswith("qlora_") or options.flag(keys["bits"]) else None,
            precision=precision,
            rounded=precision == "bf16",
            schedule=schedule or "constant",
            optimizer=_component(options, keys["optimizer"]),
            packing=packing,
            targets=_targets(options, role, mlp),
            # The builder of Llama 4 gives each expert LoRA of its own.
            target_parameters=("experts.gate_up_proj", "experts.down_proj") if mlp and "llama4" in builder else (),
            **batch,
        )
    ]


def _component(options: Options, names: str) -> str | None:
    """Return the last part of the name of a component, such as `lora_llama3_8b`."""
    name = options.text(names)
    return None if name is None else name.rpartition(".")[2]


def _rl_batch(options: Options, keys: dict[str, str]) -> dict[str, float | None]:
    """Return the fields about steps and batches in RL."""
    group, ppo = options.count(keys["group_size"]), options.count(keys["global_batch"])
    if ppo:
        # `batch_size` counts the responses of a rollout, and `num_steps` all responses.
        return {"epochs": None, "group_size": group, "micro_batch": None, "accumulation": None, "steps": None}
    # In GRPO `batch_size` counts prompts.
    prompts = options.count(keys["micro_batch"])
    micro = prompts * group if prompts is not None and group is not None else prompts
    return {"epochs": None, "global_batch": None, "micro_batch": micro, "steps": options.number(keys["steps"])}


def _model(builder: str, options: Options) -> str | None:
    name = re.sub(r"^q?lora_", "", builder)
    # A builder without a size, such as `llama2`, has its sizes in further options.
    if re.search(r"\d+b|mini", name):
        return name
    folder = options.text("training.checkpointer.checkpoint_dir checkpointer.checkpoint_dir")
    return None if folder is None else folder.rstrip("/")


def _targets(options: Options, role: str, mlp: bool) -> tuple[str, ...]:
    # The names of transformers are what other parts of the audit know.
    attention = options.names(f"{role}.lora_attn_modules") or ()
    output = options.flag(f"{role}.apply_lora_to_output")
    return (
        *("o_proj" if name == "output_proj" else name for name in attention),
        *(("gate_proj", "up_proj", "down_proj") if mlp else ()),
        *(("lm_head",) if output else ()),
    )
