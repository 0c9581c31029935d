"""Configurations of LLaMA-Factory: of its first version (llamafactory/hparams) and of its second (llamafactory/v1)."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import Options, at, defaults, examples, names_of, read_yaml, record
from lora_advice.audit.readers.shell import Word, is_script, read_commands, read_flags
from lora_advice.finding import Finding, Level

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
_LORA = ("lora_rank", "lora_alpha", "lora_target", "lora_dropout")


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
        return [config for words in read_commands(text) for config in _of_command(path, shown, words)]
    # The framework reads files with OmegaConf, to which 2e-4 is a number.
    options = read_yaml(text, as_omegaconf=True).resolved()
    return _run(path, shown, options)


def _of_command(path: Path, shown: str, words: list[Word]) -> list[TrainingConfig]:
    texts = [word.text for word in words]
    for place, word in enumerate(texts):
        if (word == "train" and place and texts[place - 1] == "llamafactory-cli") or Path(word).name == "train.py":
            options = read_flags(words[place + 1 :])
            named = "model_name_or_path" in options and ("finetuning_type" in options or "stage" in options)
            return _run(path, shown, options, f"line {words[0].line}") if named else []
    return []


def _run(path: Path, shown: str, options: Options, name: str = "") -> list[TrainingConfig]:
    first = "model_name_or_path" in options
    # Without do_train, and without training data, it is an evaluation, an export or a chat.
    if not (options.flag("do_train") if first else options.has("train_dataset")):
        return []
    if first and options.has("tokenized_path") and not any(option in options for option in _TRAINING):
        return []
    findings = options.set_twice("OmegaConf, which reads it, refuses the file")
    return [(_first if first else _second)(path, shown, name, options, findings)]


def _first(path: Path, shown: str, name: str, options: Options, findings: list[Finding]) -> TrainingConfig:
    kind = options.text("finetuning_type") or "lora"
    methods: dict[str, Method] = {"lora": "lora", "full": "fullft"}
    continued = None if options.flag("create_new_adapter") else options.text("adapter_name_or_path")
    if kind != "lora":
        level: Level = "error" if options.has("lora_rank") else "warning"
        findings = options.without_effect(_LORA, f"finetuning_type is {kind}", level) + findings
    elif continued is not None:
        reason = f"training goes on from the adapter {continued}, which has its own, without create_new_adapter"
        findings = options.without_effect(_LORA, reason, "warning") + findings
    options.fill(defaults()["llamafactory"])
    rank, packing = options.count("lora_rank"), bool(options.flag("packing") or options.flag("neat_packing"))
    bf16 = options.flag("bf16") or options.flag("pure_bf16")
    chosen = (optimizer for optimizer in _OPTIMIZERS if options.flag(f"use_{optimizer}"))
    return record(
        shown,
        "llamafactory",
        options,
        names_of("llamafactory"),
        findings,
        name=name,
        lora=kind == "lora" and continued is None,
        task=_STAGES.get(options.text("stage") or "sft"),
        method=methods.get(kind),
        bits=options.count("quantization_bit"),
        precision="bf16" if bf16 else "fp16" if options.flag("fp16") else None,
        rounded=bool(options.flag("pure_bf16")) and not options.has("deepspeed"),
        optimizer=next(chosen, options.text("optim")),
        steps=_steps(options),
        packing=packing,
        examples=None if packing or name else _examples(path, options),
        alpha=options.number("lora_alpha") or (None if rank is None else 2.0 * rank),
        # KTransformers holds the experts itself; which of its layers have LoRA is not said.
        targets=None if options.flag("use_kt") else _targets(options, "lora_target"),
        saved_modules=_split(options.names("additional_target")),
        variant="pissa" if options.flag("pissa_init") else "llama_pro" if options.flag("use_llama_pro") else None,
    )


def _second(path: Path, shown: str, name: str, options: Options, findings: list[Finding]) -> TrainingConfig:
    kind, method = options.text("peft_config.name"), None
    if kind == "lora" or not options.has("peft_config"):
        method = "lora" if kind == "lora" else "fullft"
    options.fill(defaults()["llamafactory_v1"])
    return record(
        shown,
        "llamafactory",
        options,
        names_of("llamafactory_v1"),
        findings,
        name=name,
        lora=kind == "lora" and options.text("peft_config.adapter_name_or_path") is None,
        # The command says whether it is SFT or preference training, not the file.
        method=method,
        bits=options.count("quant_config.quantization_bit"),
        precision="bf16" if options.flag("bf16") else "fp32",
        steps=_steps(options),
        targets=_targets(options, "peft_config.target_modules"),
        examples=_examples(path, options),
    )


def _steps(options: Options) -> float | None:
    steps = options.number("max_steps")
    return steps if steps is not None and steps > 0 else None


def _split(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return names in which commas separate further names."""
    return tuple(part.strip() for name in names or () for part in name.split(",") if part.strip()) or None


def _targets(options: Options, name: str) -> tuple[str, ...] | None:
    targets = _split(options.names(name))
    # `all` leaves out the unembedding, and the vision tower where that is frozen.
    return ("all-linear",) if targets == ("all",) else targets


def _examples(path: Path, options: Options) -> int | None:
    """Return the number of examples of datasets that `dataset_info.json` describes."""
    folder = options.text("dataset_dir") or "data"
    for file in (Path(folder), path.parent / folder):
        with suppress(OSError, ValueError, RecursionError):
            described = json.loads((file / "dataset_info.json").read_text(encoding="utf-8"))
            files = [at(at(described, name), "file_name") for name in _split(options.names("dataset")) or ()]
            return examples(file / "dataset_info.json", files)
    return None
