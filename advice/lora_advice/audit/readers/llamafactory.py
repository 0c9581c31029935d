"""Configurations and commands of LLaMA-Factory, as its first version (llamafactory/hparams) reads them."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import Options, at, defaults, examples, names_of, read_yaml, record
from lora_advice.audit.readers.shell import is_script, read_commands, read_flags
from lora_advice.finding import Level

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
    return "model_name_or_path" in keys and bool({"finetuning_type", "stage", "lora_target", "cutoff_len"} & keys)


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file, or those of a script's commands that state all options themselves."""
    if not is_script(path, text):
        # The framework reads files with OmegaConf, to which 2e-4 is a number.
        return _run(path, shown, read_yaml(text, as_omegaconf=True).resolved(), "")
    runs = []
    for words in read_commands(text):
        texts = [word.text for word in words]
        for place, word in enumerate(texts):
            if (word == "train" and place and texts[place - 1] == "llamafactory-cli") or Path(word).name == "train.py":
                options = read_flags(words[place + 1 :])
                if "finetuning_type" in options or "stage" in options:
                    runs += _run(path, shown, options, f"line {words[0].line}")
                break
    return runs


def _run(path: Path, shown: str, options: Options, name: str) -> list[TrainingConfig]:
    # Without do_train it is an evaluation, an export or a chat.
    if "model_name_or_path" not in options or not options.flag("do_train"):
        return []
    if options.has("tokenized_path") and not any(option in options for option in _TRAINING):
        return []
    findings = []
    kind = options.text("finetuning_type") or "lora"
    continued = None if options.flag("create_new_adapter") else options.text("adapter_name_or_path")
    if kind != "lora":
        level: Level = "error" if options.has("lora_rank") else "warning"
        findings = options.without_effect(_LORA, f"finetuning_type is {kind}", level)
    elif continued is not None:
        reason = f"training goes on from the adapter {continued}, which has its own, without create_new_adapter"
        findings = options.without_effect(_LORA, reason, "warning")
    options.fill(defaults()["llamafactory"])
    methods: dict[str, Method] = {"lora": "lora", "full": "fullft"}
    packing = options.flag("packing") or options.flag("neat_packing")
    rank, steps = options.count("lora_rank"), options.number("max_steps") or 0
    targets: tuple[str, ...] | None = _split(options.names("lora_target"))
    if targets == ("all",):
        # It leaves out the unembedding, and the vision tower where that is frozen.
        targets = ("all-linear",)
    return [
        record(
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
            rounded=bool(options.flag("pure_bf16")) and not options.has("deepspeed"),
            optimizer=next((own for own in _OPTIMIZERS if options.flag(f"use_{own}")), options.text("optim")),
            steps=steps if steps > 0 else None,
            examples=None if packing or name else _examples(path, options),
            alpha=options.number("lora_alpha") or (None if rank is None else 2.0 * rank),
            # KTransformers holds the experts itself; which of its layers have LoRA is not said.
            targets=None if options.flag("use_kt") else targets,
            saved_modules=_split(options.names("additional_target")),
            variant="pissa" if options.flag("pissa_init") else "llama_pro" if options.flag("use_llama_pro") else None,
        )
    ]


def _split(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return names in which commas separate further names."""
    return tuple(part.strip() for name in names or () for part in name.split(",") if part.strip()) or None


def _examples(path: Path, options: Options) -> int | None:
    """Return the number of examples of datasets that `dataset_info.json` describes."""
    folder = options.text("dataset_dir") or "data"
    for file in (Path(folder), path.parent / folder):
        with suppress(OSError, ValueError, RecursionError):
            described = json.loads((file / "dataset_info.json").read_text(encoding="utf-8"))
            files = [at(at(described, name), "file_name") for name in _split(options.names("dataset")) or ()]
            return examples(file / "dataset_info.json", files)
    return None
