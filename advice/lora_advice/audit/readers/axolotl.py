"""Configurations of Axolotl, as its schemas (axolotl/utils/schemas) read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers import options
from lora_advice.audit.readers.options import count, flag, names, number, text, variant_of
from lora_advice.audit.yaml_lines import load
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level

_KEYS = {
    "model": "base_model",
    "method": "adapter",
    "task": "rl",
    "lr": "learning_rate",
    "schedule": "lr_scheduler",
    "optimizer": "optimizer",
    "micro_batch": "micro_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "group_size": "trl.num_generations",
    "steps": "max_steps",
    "epochs": "num_epochs",
    "max_length": "sequence_len",
    "packing": "sample_packing",
    "rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "peft_use_rslora",
    "dora": "peft_use_dora",
    "lr_ratio": "loraplus_lr_ratio",
    "variant": "peft_init_lora_weights",
    "targets": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "saved_modules": "lora_modules_to_save",
}
_LORA_OPTIONS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_linear",
    "lora_target_parameters",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_init_lora_weights",
    "loraplus_lr_ratio",
)
# With these, some of the weights are trained, whole.
_PARTIAL = ("unfrozen_parameters", "lisa_n_layers", "spectrum_top_fraction")


def matches(path: Path, text: str) -> bool:
    """Return whether a file has the options that every configuration of Axolotl has."""
    return path.suffix in (".yml", ".yaml") and bool(
        re.search(r"^base_model\s*:", text, re.MULTILINE)
        and re.search(
            r"^(micro_batch_size|sequence_len|datasets|pretraining_dataset|num_epochs|learning_rate)\s*:",
            text,
            re.MULTILINE,
        )
    )


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    data, lines = load(text)
    if not isinstance(data, dict):
        raise UserError("it has no options: a configuration of Axolotl is a mapping")
    if not any(key in data for key in ("learning_rate", "datasets", "pretraining_dataset", "adapter")):
        return []
    said = _said(data)
    if not said["packing"] and isinstance(datasets := data.get("datasets"), list):
        said["examples"] = options.examples(path, [options.at(dataset, "path") for dataset in datasets])
    adapter = options.text(data.get("adapter"))
    findings = [
        *options.lr_findings(data.get("learning_rate"), "learning_rate", lines.get("learning_rate"), "Axolotl"),
        *options.repeated_findings(lines.repeated, lines, "the last one counts"),
        *_without_effect(data, adapter, lines),
    ]
    places = options.lines_of(_KEYS, lines)
    if flag(data.get("lora_target_linear")):
        places["targets"] = lines["lora_target_linear"]
    for key in ("warmup_steps", "warmup_ratio"):
        if data.get(key) is not None:
            places["warmup"] = lines[key]
    config = TrainingConfig(shown, "axolotl", lines=places, findings=tuple(findings), **said)
    return [options.checked(config, {field: options.at(data, key) for field, key in _KEYS.items()})]


def _said(data: Mapping[str, Any]) -> dict[str, Any]:
    adapter = text(data.get("adapter"))
    method: Method | None = None
    if adapter in ("lora", "qlora"):
        method = "lora"
    elif adapter is None and not any(data.get(key) for key in _PARTIAL):
        method = "fullft"
    said: dict[str, Any] = {
        "task": _task(data),
        "method": method,
        "model": text(data.get("base_model")),
        "bits": 4
        if flag(data.get("load_in_4bit")) or flag(data.get("gptq"))
        else 8
        if flag(data.get("load_in_8bit"))
        else None,
        "precision": _precision(data),
        # The model is loaded in bf16. DeepSpeed keeps an fp32 copy, FSDP in accelerate holds what is trained in fp32,
        # and optimi's optimizers add what rounding loses to the next step.
        "rounded": _precision(data) == "bf16"
        and not any(data.get(key) for key in ("deepspeed", "fsdp", "fsdp_config"))
        and not (text(data.get("optimizer")) or "").startswith("optimi"),
        "lr": number(data.get("learning_rate")),
        "schedule": text(data.get("lr_scheduler")) or "cosine",
        "warmup": number(data.get("warmup_steps")) or number(data.get("warmup_ratio")),
        "optimizer": text(data.get("optimizer")),
        "steps": number(data.get("max_steps")),
        "epochs": number(data.get("num_epochs")) or 1.0,
        "max_length": count(data.get("sequence_len")),
        "packing": flag(data.get("sample_packing")),
        **_batch(data),
    }
    if method == "lora" and not text(data.get("lora_model_dir")):
        said |= _lora(data)
    return said


def _task(data: Mapping[str, Any]) -> Task | None:
    objective = text(data.get("rl"))
    if objective in ("grpo", "gdpo", "ebft"):
        return "rl"
    if objective in ("dpo", "ipo", "orpo", "kto", "simpo") or flag(data.get("reward_model")):
        return "preference"
    if objective is not None or flag(data.get("process_reward_model")):
        return None
    return "pretraining" if data.get("pretraining_dataset") or _plain_text(data.get("datasets")) else "sft"


def _plain_text(datasets: Any) -> bool:
    """Return whether all datasets are plain texts, of which every token is scored."""
    given = datasets if isinstance(datasets, list) else []
    return bool(given) and all(options.at(dataset, "type") == "completion" for dataset in given)


def _precision(data: Mapping[str, Any]) -> str | None:
    bf16, fp16 = (data.get("bf16"), data.get("bfloat16")), (data.get("fp16"), data.get("float16"))
    # `auto` is bf16 on every GPU since Ampere; `full` evaluates in bf16 too.
    if any(value in ("auto", "full") or flag(value) for value in bf16):
        return "bf16"
    if any(map(flag, fp16)):
        return "fp16"
    return "fp32" if data.get("bf16") is False else None


def _batch(data: Mapping[str, Any]) -> dict[str, Any]:
    micro = count(data.get("micro_batch_size")) or 1
    accumulation = count(data.get("gradient_accumulation_steps"))
    if accumulation is None:
        # `batch_size` is that of a device; a file sets only one of the two.
        accumulation = max(1, (count(data.get("batch_size")) or micro) // micro)
    group = count(options.at(data, "trl.num_generations")) if text(data.get("rl")) in ("grpo", "gdpo") else None
    # In GRPO, the examples of a batch are responses.
    return {"micro_batch": micro, "accumulation": accumulation, "group_size": group}


def _lora(data: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {
        "rank": count(data.get("lora_r")),
        "alpha": number(data.get("lora_alpha")),
        "dropout": number(data.get("lora_dropout")) or 0.0,
        "rslora": flag(data.get("peft_use_rslora")),
        "dora": flag(data.get("peft_use_dora")),
        "lr_ratio": number(data.get("loraplus_lr_ratio")),
        "target_parameters": names(data.get("lora_target_parameters")) or (),
        "saved_modules": names(data.get("lora_modules_to_save")) or (),
    }
    targets = data.get("lora_target_modules")
    # A text is a regular expression, which may have commas.
    said["targets"] = (targets,) if isinstance(targets, str) and targets else names(targets)
    if flag(data.get("lora_target_linear")):
        beyond = {"lm_head", "embed_tokens"}
        said["targets"] = ("all-linear", *(name for name in said["targets"] or () if name in beyond))
    elif said["targets"] is None and said["target_parameters"]:
        said["targets"] = ()
    initialization = data.get("peft_init_lora_weights")
    if isinstance(initialization, str):
        said["variant"] = variant_of(initialization)
    elif options.at(data, "peft.loftq_config"):
        said["variant"] = "loftq"
    elif flag(data.get("relora")):
        said["variant"] = "relora"
    return said


def _without_effect(data: Mapping[str, Any], adapter: str | None, lines: Mapping[str, int]) -> list[Finding]:
    stated = [key for key in _LORA_OPTIONS if data.get(key)]
    if not stated:
        return []
    if adapter is None:
        level: Level = "error" if stated[0] == "lora_r" else "warning"
        return [options.without_effect(data, stated, "`adapter` is not set: all weights are trained", level, lines)]
    if continued := text(data.get("lora_model_dir")):
        reason = f"training goes on from the adapter in lora_model_dir, {continued}, which has its own"
        return [options.without_effect(data, stated, reason, "warning", lines)]
    return []
