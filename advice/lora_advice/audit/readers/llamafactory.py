"""Configurations of LLaMA-Factory: of its first version (llamafactory/hparams) and of its second (llamafactory/v1)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers import options
from lora_advice.audit.readers.options import count, flag, names, number, text
from lora_advice.audit.readers.shell import Word, is_script, read_commands, read_flags
from lora_advice.audit.yaml_lines import load, resolve
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level

_KEYS = {
    "model": "model_name_or_path",
    "method": "finetuning_type",
    "task": "stage",
    "bits": "quantization_bit",
    "lr": "learning_rate",
    "schedule": "lr_scheduler_type",
    "optimizer": "optim",
    "micro_batch": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "max_length": "cutoff_len",
    "packing": "packing",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "lr_ratio": "loraplus_lr_ratio",
    "variant": "pissa_init",
    "targets": "lora_target",
    "saved_modules": "additional_target",
}
_KEYS_V1 = {
    "model": "model",
    "method": "peft_config.name",
    "bits": "quant_config.quantization_bit",
    "lr": "learning_rate",
    "schedule": "lr_scheduler_config.name",
    "optimizer": "optim_config.name",
    "micro_batch": "micro_batch_size",
    "global_batch": "global_batch_size",
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "max_length": "cutoff_len",
    "rank": "peft_config.r",
    "alpha": "peft_config.lora_alpha",
    "dropout": "peft_config.lora_dropout",
    "rslora": "peft_config.use_rslora",
    "dora": "peft_config.use_dora",
    "targets": "peft_config.target_modules",
    "saved_modules": "peft_config.modules_to_save",
}
_STAGES: dict[str, Task] = {
    "pt": "pretraining",
    "sft": "sft",
    "rm": "preference",
    "dpo": "preference",
    "kto": "preference",
    "ppo": "rl",
}
_TRAINING = ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps")
"""Options of which a file has none if it only writes the tokens of datasets into the folder `tokenized_path`."""
# Of an optimizer that an option of its own chooses.
_OPTIMIZERS = ("galore", "apollo", "badam", "adam_mini", "muon")


def matches(path: Path, text: str) -> bool:
    """Return whether a file has options or a command that only LLaMA-Factory has."""
    if is_script(path, text):
        return "llamafactory-cli train" in text or re.search(r"--(finetuning_type|lora_target)\b", text) is not None
    if path.suffix not in (".yml", ".yaml", ".json"):
        return False
    keys = set(re.findall(r'^[ \t]*"?(\w+)"?\s*:', text, re.MULTILINE))
    first = "model_name_or_path" in keys and bool({"finetuning_type", "stage", "lora_target", "cutoff_len"} & keys)
    return first or ({"model", "cutoff_len"} <= keys and bool({"peft_config", "train_dataset", "dist_config"} & keys))


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file, or those of a script's commands that state all options themselves."""
    if is_script(path, text):
        return [config for words in read_commands(text) for config in _of_command(shown, words)]
    # The framework reads files with OmegaConf, to which 2e-4 is a number.
    raw, lines = load(text, as_omegaconf=True)
    if not isinstance(raw, dict):
        raise UserError("it has no options: a configuration of LLaMA-Factory is a mapping")
    repeated = options.repeated_findings(lines.repeated, lines, "OmegaConf, which reads it, refuses the file")
    data = resolve(raw)
    return [
        config if config.packing else replace(config, examples=_examples(path, data))
        for config in _run(shown, "", data, lines, repeated)
    ]


def _examples(path: Path, data: Mapping[str, Any]) -> int | None:
    """Return the number of examples of datasets that `dataset_info.json` describes."""
    folder = options.text(data.get("dataset_dir")) or "data"
    for file in (Path(folder), path.parent / folder):
        with suppress(OSError, ValueError, RecursionError):
            described = json.loads((file / "dataset_info.json").read_text(encoding="utf-8"))
            files = [options.at(described, f"{name}.file_name") for name in names(data.get("dataset")) or ()]
            return options.examples(file / "dataset_info.json", files)
    return None


def _of_command(shown: str, words: list[Word]) -> list[TrainingConfig]:
    texts = [word.text for word in words]
    for at, word in enumerate(texts):
        if (word == "train" and at and texts[at - 1] == "llamafactory-cli") or Path(word).name == "train.py":
            given = read_flags(words[at + 1 :])
            named = "model_name_or_path" in given and ("finetuning_type" in given or "stage" in given)
            return _run(shown, f"line {words[0].line}", given.values, given.lines, []) if named else []
    return []


def _run(
    shown: str, name: str, data: Mapping[str, Any], lines: Mapping[str, int], found: list[Finding]
) -> list[TrainingConfig]:
    first = "model_name_or_path" in data
    # Without do_train, and without training data, it is an evaluation, an export or a chat.
    if not flag(data.get("do_train")) if first else not data.get("train_dataset"):
        return []
    if first and data.get("tokenized_path") and not any(key in data for key in _TRAINING):
        return []
    said, findings = _first(data, lines) if first else (_second(data), [])
    keys = _KEYS if first else _KEYS_V1
    places = options.lines_of(keys, lines)
    for key in ("warmup_ratio", "warmup_steps"):
        if data.get(key) is not None:
            places["warmup"] = lines[key]
    config = TrainingConfig(shown, "llamafactory", name, lines=places, findings=(*findings, *found), **said)
    return [options.checked(config, {field: options.at(data, key) for field, key in keys.items()})]


def _first(data: Mapping[str, Any], lines: Mapping[str, int]) -> tuple[dict[str, Any], list[Finding]]:
    kind = text(data.get("finetuning_type")) or "lora"
    method: Method | None = {"lora": "lora", "full": "fullft"}.get(kind)  # type: ignore[assignment]
    continued = text(data.get("adapter_name_or_path")) if not flag(data.get("create_new_adapter")) else None
    optimizer = next((name for name in _OPTIMIZERS if flag(data.get(f"use_{name}"))), text(data.get("optim")))
    steps = number(data.get("max_steps"))
    said: dict[str, Any] = {
        "task": _STAGES.get(text(data.get("stage")) or "sft"),
        "method": method,
        "model": text(data.get("model_name_or_path")),
        "bits": count(data.get("quantization_bit")),
        "precision": _precision(data),
        "rounded": flag(data.get("pure_bf16")) and not data.get("deepspeed"),
        # Where nothing is said, these are the defaults of transformers.
        "lr": number(data.get("learning_rate", 5e-5)),
        "schedule": text(data.get("lr_scheduler_type", "linear")),
        "warmup": number(data.get("warmup_steps")) or number(data.get("warmup_ratio")),
        "optimizer": optimizer,
        "micro_batch": count(data.get("per_device_train_batch_size", 8)),
        "accumulation": count(data.get("gradient_accumulation_steps", 1)),
        "steps": steps if steps is not None and steps > 0 else None,
        "epochs": number(data.get("num_train_epochs", 3)),
        "max_length": count(data.get("cutoff_len", 2048)),
        "packing": flag(data.get("packing")) or flag(data.get("neat_packing")),
    }
    if method == "lora" and continued is None:
        rank = count(data.get("lora_rank", 8))
        said |= {
            "rank": rank,
            "alpha": number(data.get("lora_alpha")) or (None if rank is None else 2.0 * rank),
            "dropout": number(data.get("lora_dropout", 0.0)),
            "rslora": flag(data.get("use_rslora")),
            "dora": flag(data.get("use_dora")),
            "lr_ratio": number(data.get("loraplus_lr_ratio")),
            # KTransformers holds the experts itself; which of its layers have LoRA is not said.
            "targets": None if flag(data.get("use_kt")) else _targets(data.get("lora_target", "all")),
            "saved_modules": names(data.get("additional_target")) or (),
            "variant": _variant(data),
        }
    return said, _without_effect(data, kind, continued, lines)


def _second(data: Mapping[str, Any]) -> dict[str, Any]:
    adapter = data.get("peft_config")
    kind = text(options.at(data, "peft_config.name"))
    continued = bool(adapter) and text(options.at(data, "peft_config.adapter_name_or_path")) is not None
    steps = number(data.get("max_steps"))
    said: dict[str, Any] = {
        # The command says whether it is SFT or preference training, not the file.
        "method": "lora" if kind == "lora" else "fullft" if not adapter else None,
        "model": text(data.get("model")),
        "bits": count(options.at(data, "quant_config.quantization_bit")),
        "precision": "bf16" if flag(data.get("bf16", True)) else "fp32",
        "lr": number(data.get("learning_rate", 1e-4)),
        "schedule": text(options.at(data, "lr_scheduler_config.name")),
        "optimizer": text(options.at(data, "optim_config.name")),
        "micro_batch": count(data.get("micro_batch_size", 1)),
        "global_batch": count(data.get("global_batch_size")),
        "steps": steps if steps is not None and steps > 0 else None,
        "epochs": number(data.get("num_train_epochs", 3)),
        "max_length": count(data.get("cutoff_len", 2048)),
    }
    if kind == "lora" and not continued:
        said |= {
            "rank": count(options.at(data, "peft_config.r") or 8),
            "alpha": number(options.at(data, "peft_config.lora_alpha") or 16),
            "dropout": number(adapter.get("lora_dropout", 0.05)) if isinstance(adapter, Mapping) else None,
            "rslora": flag(options.at(data, "peft_config.use_rslora")),
            "dora": flag(options.at(data, "peft_config.use_dora")),
            "targets": _targets(options.at(data, "peft_config.target_modules") or "all"),
            "saved_modules": names(options.at(data, "peft_config.modules_to_save")) or (),
        }
    return said


def _precision(data: Mapping[str, Any]) -> str | None:
    if flag(data.get("bf16")) or flag(data.get("pure_bf16")):
        return "bf16"
    return "fp16" if flag(data.get("fp16")) else None


def _targets(value: Any) -> tuple[str, ...] | None:
    said = names(value)
    # `all` leaves out the unembedding, and the vision tower where that is frozen.
    return ("all-linear",) if said == ("all",) else said


def _variant(data: Mapping[str, Any]) -> str | None:
    if flag(data.get("pissa_init")):
        return "pissa"
    return "llama_pro" if flag(data.get("use_llama_pro")) else None


def _without_effect(
    data: Mapping[str, Any], kind: str, continued: str | None, lines: Mapping[str, int]
) -> list[Finding]:
    stated = [key for key in ("lora_rank", "lora_alpha", "lora_target", "lora_dropout") if data.get(key)]
    if not stated or (kind == "lora" and continued is None):
        return []
    if kind != "lora":
        level: Level = "error" if stated[0] == "lora_rank" else "warning"
        return [options.without_effect(data, stated, f"finetuning_type is {kind}", level, lines)]
    reason = f"training goes on from the adapter {continued}, which has its own, without create_new_adapter"
    return [options.without_effect(data, stated, reason, "warning", lines)]
