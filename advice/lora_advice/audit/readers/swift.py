"""Commands and configurations of ms-swift, and the `args.json` that it writes, as its versions 2 to 4 name options."""

from __future__ import annotations

import math
import re
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig
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
_TUNER = "tuner_type train_type sft_type"
_PARTIAL = (
    "freeze_parameters_ratio",
    "freeze_parameters_regex",
    "trainable_parameters",
    "trainable_parameters_regex",
    "lisa_activated_layers",
)
"""Options by which some of the weights are trained, whole."""


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run of a file, or those of a script's commands; the commands of Megatron have other options."""
    if path.suffix in (".yaml", ".yml", ".json"):
        return _run(path, read_yaml(content), None, "")
    runs = []
    for words in read_commands(content):
        texts = [word.text for word in words]
        for place, (word, following) in enumerate(zip(texts, [*texts[1:], ""], strict=True)):
            program = re.search(r"\bswift[./]cli[./](sft|pt|rlhf)(\.py)?$", word)
            if program or (word == "swift" and following in ("sft", "pt", "rlhf")):
                options = read_flags(words[place + (1 if program else 2) :])
                # The environment of the command says how many processes there are.
                settings = [text.partition("=") for text in texts[:place]]
                options.fill({name: value for name, _, value in settings if name in ("NPROC_PER_NODE", "NNODES")})
                runs += _run(path, options, program[1] if program else following, f"line {words[0].line}")
                break
    return runs


def _run(path: Path, options: Options, command: str | None, name: str) -> list[TrainingConfig]:
    table, saved = frameworks()["swift"], "swift_version" in options
    if options[table["names"]["model"]] is None or text(options["task_type"]) not in (None, "causal_lm"):
        return []  # a classifier, or the vectors of texts
    # What is saved states every option, also those without effect.
    findings = [] if saved or command is None else misspelt("swift", options)
    tuner = text(options[_TUNER]) or "lora"
    continued = None if saved else next(iter(names(options["adapters"]) or ()), None)
    if tuner == "full" and not saved:
        level: Level = "error" if options.has("lora_rank") else "warning"
        findings += options.without_effect("swift", "the tuner is full", level)
    elif continued is not None:
        reason = f"training goes on from the adapter {continued}, which has its own"
        findings += options.without_effect("swift", reason, "warning")
    if "sft_type" not in options:  # version 2 had other defaults
        options.fill(table["defaults"] | {"learning_rate": 1e-5 if tuner == "full" else 1e-4})
    objective = text(options["rlhf_type"]) or ("dpo" if command == "rlhf" else None)
    task: Task | None = table["tasks"].get(objective or command)
    if saved and objective is None:
        # Plain texts have no chat template.
        task = "pretraining" if flag(options["use_chat_template"]) is False else "sft"
    per_node, nodes = count(options["NPROC_PER_NODE"]), count(options["NNODES"]) or 1
    devices = count(options["global_world_size"]) or (per_node * nodes if per_node else None)
    micro, accumulation = count(options[table["names"]["micro_batch"]]), count(options["gradient_accumulation_steps"])
    if micro and "gradient_accumulation_steps" not in options:
        # It is chosen so that a step has 16 examples, whatever the number of devices.
        devices = devices or 1
        accumulation = math.ceil(16 / micro / devices)
    targets, steps = names(options["target_regex"] or options[table["names"]["targets"]]), number(options["max_steps"])
    initialization = text(options[table["names"]["variant"]])
    return [
        record(
            path,
            "swift",
            options,
            findings=findings,
            name=name,
            lora=tuner == "lora" and continued is None,
            task=task,
            method=None if tuner == "full" and any(map(options.has, _PARTIAL)) else _METHODS.get(tuner),
            bits=count(options["quant_bits quantization_bit"]),
            # DeepSpeed and FSDP hold what is trained in fp32.
            rounded=text(options["torch_dtype"]) == "bfloat16" and not any(map(options.has, ("deepspeed", "fsdp"))),
            optimizer="galore" if flag(options["use_galore"]) else text(options[table["names"]["optimizer"]]),
            accumulation=accumulation,
            devices=devices,
            group_size=count(options["num_generations"]) if task == "rl" else None,
            steps=steps if steps and steps > 0 else None,
            targets=("all-linear",) if targets in (("ALL",), ("all",)) else targets,
            variant=None if (initialization or "").lower() in ("true", "false", "gaussian") else initialization,
        )
    ]
