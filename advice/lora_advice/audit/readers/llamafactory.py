"""Configurations and commands of LLaMA-Factory, as its first version (llamafactory/hparams) reads them."""

from __future__ import annotations

from pathlib import Path

from lora_advice.audit.config import Method, TrainingConfig
from lora_advice.audit.readers.options import (
    Options,
    count,
    flag,
    frameworks,
    misspelt,
    names,
    number,
    read_yaml,
    record,
    text,
)
from lora_advice.audit.readers.shell import read_commands, read_flags
from lora_advice.finding import Level

_METHODS: dict[str, Method] = {"lora": "lora", "full": "fullft"}
_TRAINING = ("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps")
"""Options of which a file has none if it only writes the tokens of datasets into the folder `tokenized_path`."""
# Of an optimizer that an option of its own chooses.
_OPTIMIZERS = ("galore", "apollo", "badam", "adam_mini", "muon")


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run of a file, or those of a script's commands that state all options themselves."""
    if path.suffix in (".yml", ".yaml", ".json"):
        # The framework reads files with OmegaConf.
        return _run(path, read_yaml(content, as_omegaconf=True), "")
    runs = []
    for words in read_commands(content):
        texts = [word.text for word in words]
        for place, word in enumerate(texts):
            if (word == "train" and place and texts[place - 1] == "llamafactory-cli") or Path(word).name == "train.py":
                options = read_flags(words[place + 1 :])
                if "finetuning_type" in options or "stage" in options:
                    runs += _run(path, options, f"line {words[0].line}")
                break
    return runs


def _run(path: Path, options: Options, name: str) -> list[TrainingConfig]:
    # Without do_train it is an evaluation, an export or a chat.
    if "model_name_or_path" not in options or not flag(options["do_train"]):
        return []
    if options.has("tokenized_path") and not any(option in options for option in _TRAINING):
        return []
    findings = misspelt("llamafactory", options)
    kind = text(options["finetuning_type"]) or "lora"
    continued = None if flag(options["create_new_adapter"]) else text(options["adapter_name_or_path"])
    if kind != "lora":
        level: Level = "error" if options.has("lora_rank") else "warning"
        findings += options.without_effect("llamafactory", f"finetuning_type is {kind}", level)
    elif continued is not None:
        reason = f"training goes on from the adapter {continued}, which has its own, without create_new_adapter"
        findings += options.without_effect("llamafactory", reason, "warning")
    options.fill(frameworks()["llamafactory"]["defaults"])
    rank, steps = count(options["lora_rank"]), number(options["max_steps"]) or 0
    targets: tuple[str, ...] | None = _split(options["lora_target"])
    if targets == ("all",):
        # It leaves out the unembedding, and the vision tower where that is frozen.
        targets = ("all-linear",)
    own = (own for own in _OPTIMIZERS if flag(options[f"use_{own}"]))
    return [
        record(
            path,
            "llamafactory",
            options,
            findings=findings,
            name=name,
            lora=kind == "lora" and continued is None,
            task=frameworks()["llamafactory"]["tasks"].get(text(options["stage"]) or "sft"),
            method=_METHODS.get(kind),
            bits=count(options["quantization_bit"]),
            rounded=bool(flag(options["pure_bf16"])) and not options.has("deepspeed"),
            optimizer=next(own, text(options["optim"])),
            steps=steps if steps > 0 else None,
            alpha=number(options["lora_alpha"]) or (None if rank is None else 2.0 * rank),
            # KTransformers holds the experts itself; which of its layers have LoRA is not said.
            targets=None if flag(options["use_kt"]) else targets,
            saved_modules=_split(options["additional_target"]),
            variant="pissa" if flag(options["pissa_init"]) else "llama_pro" if flag(options["use_llama_pro"]) else None,
        )
    ]


def _split(value: object) -> tuple[str, ...] | None:
    """Return names in which commas separate further names."""
    return tuple(part.strip() for name in names(value) or () for part in name.split(",") if part.strip()) or None
