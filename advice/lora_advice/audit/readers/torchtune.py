"""Configurations of torchtune's recipes. What is not in them, such as the number of devices, is on the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers import options
from lora_advice.audit.readers.options import count, flag, names, number, text
from lora_advice.audit.yaml_lines import load, resolve
from lora_advice.errors import UserError

_KEYS = {
    "lr": "optimizer.lr",
    "schedule": "lr_scheduler._component_",
    "warmup": "lr_scheduler.num_warmup_steps",
    "optimizer": "optimizer._component_",
    "precision": "dtype",
    "micro_batch": "batch_size",
    "accumulation": "gradient_accumulation_steps",
    "group_size": "grpo_samples",
    "global_batch": "ppo_batch_size",
    "steps": "num_steps",
    "epochs": "epochs",
    "max_length": "tokenizer.max_seq_len",
    "packing": "dataset.packed",
    "task": "loss._component_",
}
# Keys of the model, which is `model`, or `policy_model` in PPO.
_MODEL_KEYS = {
    "model": "_component_",
    "method": "_component_",
    "bits": "quantize_base",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "dora": "use_dora",
    "targets": "lora_attn_modules",
}
_MLP = ("gate_proj", "up_proj", "down_proj")


def matches(path: Path, text: str) -> bool:
    """Return whether a file names components of torchtune and an optimizer."""
    return (
        path.suffix in (".yml", ".yaml")
        and "_component_: torchtune." in text
        and re.search(r"^[ \t]*optimizer\s*:", text, re.MULTILINE) is not None
    )


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    # The framework reads files with OmegaConf, to which 2e-4 is a number.
    raw, lines = load(text, as_omegaconf=True)
    if not isinstance(raw, dict):
        raise UserError("it has no options: a configuration of torchtune is a mapping")
    data = resolve(raw)
    # In asynchronous RL, what concerns training has a mapping of its own.
    training = "training." if options.at(data, "training.optimizer") else ""
    role = next((key for key in ("model", "policy_model") if options.text(options.at(data, f"{key}._component_"))), "")
    if not role or not options.at(data, f"{training}optimizer"):
        return []
    within = data["training"] if training else {}
    keys = {name: training + key for name, key in _KEYS.items()}
    keys |= {name: f"{role}.{key}" for name, key in _MODEL_KEYS.items()}
    places = options.lines_of(keys, lines)
    findings = options.repeated_findings(lines.repeated, lines, "OmegaConf, which reads it, refuses the file")
    said = _said({**data, **within}, data[role])
    if not said["packing"] and said["task"] == "sft":
        said["examples"] = options.examples(path, options.at(data, "dataset.data_files"))
    config = TrainingConfig(shown, "torchtune", lines=places, findings=tuple(findings), **said)
    return [options.checked(config, {field: options.at(data, key) for field, key in keys.items()})]


def _said(data: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    builder = _component(model) or ""
    method = _method(builder, model)
    task = _task(data)
    schedule = re.sub(r"^get_|_schedule_with_warmup$", "", _component(data.get("lr_scheduler")) or "") or "constant"
    said: dict[str, Any] = {
        "task": task,
        "method": method,
        "model": _model(builder, data),
        "bits": 4 if builder.startswith("qlora_") or flag(model.get("quantize_base")) else None,
        "precision": text(data.get("dtype")),
        "rounded": text(data.get("dtype")) == "bf16",
        "lr": number(options.at(data, "optimizer.lr")),
        "schedule": schedule,
        "warmup": number(options.at(data, "lr_scheduler.num_warmup_steps")),
        "optimizer": _component(data.get("optimizer")),
        "micro_batch": count(data.get("batch_size")),
        "accumulation": count(data.get("gradient_accumulation_steps")),
        "epochs": number(data.get("epochs")),
        "max_length": count(options.at(data, "tokenizer.max_seq_len")),
        "packing": flag(options.at(data, "dataset.packed")),
    }
    if task == "rl":
        # In PPO `batch_size` counts the responses of a rollout, and `num_steps` all responses.
        ppo = count(data.get("ppo_batch_size"))
        # In GRPO it counts prompts.
        group = count(data.get("grpo_samples"))
        said |= {"epochs": None, "group_size": group}
        if group is not None and said["micro_batch"] is not None:
            said["micro_batch"] *= group
        said |= {"micro_batch": None, "accumulation": None, "global_batch": ppo} if ppo else {}
        said["steps"] = None if ppo else number(data.get("num_steps"))
    if method == "lora":
        said |= _lora(builder, model)
    return said


def _component(value: Any) -> str | None:
    """Return the last part of the name of a component, such as `lora_llama3_8b`."""
    name = text(options.at(value, "_component_"))
    return None if name is None else name.rpartition(".")[2]


def _method(builder: str, model: Mapping[str, Any]) -> Method | None:
    # A model of text and pictures says for each part what is trained; with a frozen decoder it is neither.
    decoder = model.get("decoder_trainable")
    if decoder in (False, "frozen"):
        return None
    return "lora" if builder.startswith(("lora_", "qlora_")) else "fullft"


def _model(builder: str, data: Mapping[str, Any]) -> str | None:
    name = re.sub(r"^q?lora_", "", builder)
    # A builder without a size, such as `llama2`, has its sizes in further options.
    if re.search(r"\d+b|mini", name):
        return name
    folder = text(options.at(data, "checkpointer.checkpoint_dir"))
    return None if folder is None else folder.rstrip("/")


def _task(data: Mapping[str, Any]) -> Task:
    loss = _component(data.get("loss")) or ""
    if "DPO" in loss or "RSO" in loss or "SimPO" in loss:
        return "preference"
    return "rl" if "GRPO" in loss or "PPO" in loss else "sft"


def _lora(builder: str, model: Mapping[str, Any]) -> dict[str, Any]:
    # The names of transformers are what other parts of the audit know.
    attention = tuple({"output_proj": "o_proj"}.get(name, name) for name in names(model.get("lora_attn_modules")) or ())
    mlp, experts = flag(model.get("apply_lora_to_mlp")), "llama4" in builder
    return {
        # All builders of torchtune have these defaults.
        "rank": count(model.get("lora_rank", 8)),
        "alpha": number(model.get("lora_alpha", 16)),
        "dropout": number(model.get("lora_dropout", 0.0)),
        "dora": flag(model.get("use_dora")),
        "targets": (
            *attention,
            *(_MLP if mlp else ()),
            *(("lm_head",) if flag(model.get("apply_lora_to_output")) else ()),
        ),
        # The builder of Llama 4 gives each expert LoRA of its own.
        "target_parameters": ("experts.gate_up_proj", "experts.down_proj") if mlp and experts else (),
    }
