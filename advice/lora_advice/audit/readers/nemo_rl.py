"""NVIDIA NeMo-RL: its YAML files, with the files that they inherit from.

`policy.megatron_cfg.enabled` decides whether the options of Megatron count or those of the other backend (DTensor).
An optimizer step takes `train_global_batch_size` examples, which are responses in RL. What a file inherits has no line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import Options, at, read_yaml, record, text_of
from lora_advice.errors import UserError

_TASKS: dict[str, Task | None] = {
    "grpo": "rl",
    "ppo": "rl",
    "sft": "sft",
    "dpo": "preference",
    "rm": "preference",
    "distillation": None,
}
"""By the section that has the options of the algorithm."""
_SECTION = re.compile(rf"^(policy|{'|'.join(_TASKS)}) *:", re.MULTILINE)
_BASE = re.compile(r"^defaults *:|^ +model_name *:", re.MULTILINE)
_NO_LIMIT = 1e5
"""Steps that NeMo-RL's own files set where the epochs decide."""


def matches(path: Path, text: str) -> bool:
    """Return whether a YAML file has NeMo-RL's sections."""
    in_yaml = path.suffix in (".yaml", ".yml")
    return in_yaml and _SECTION.search(text) is not None and _BASE.search(text) is not None


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a file."""
    options, missing = _read_file(path, text, {})
    options = options.resolved()
    if not any(name.startswith("policy.") for name in options.values):
        return []
    findings = []
    if missing:
        what = f"{missing}, from which the file inherits, is not there: what it sets is not known"
        findings.append(say("not-known", what=what))
    section = next((name for name in _TASKS if any(key.startswith(f"{name}.") for key in options.values)), "")
    task, megatron = _TASKS.get(section), options.flag("policy.megatron_cfg.enabled")
    if megatron is None and missing:  # the file that is not there may set it
        of_megatron = ("policy.megatron_cfg.peft.", "policy.megatron_cfg.optimizer.")
        megatron = any(key.startswith(of_megatron) for key in options.values)
    lora = "policy.dtensor_cfg.lora_cfg."
    optimizer = {"lr": "policy.optimizer.kwargs.lr", "optimizer": "policy.optimizer.name"}
    if megatron:
        lora, section_of = "policy.megatron_cfg.peft.", "policy.megatron_cfg.optimizer"
        optimizer = {"lr": f"{section_of}.lr", "optimizer": f"{section_of}.optimizer"}
        schedule = options.text("policy.megatron_cfg.scheduler.lr_decay_style")
    else:
        parts = options.get("policy.scheduler")
        named = [name for part in (parts if isinstance(parts, list) else ()) if (name := text_of(at(part, "name")))]
        schedule = named[-1].rpartition(".")[2] if named else None
    keys = optimizer | {
        "model": "policy.model_name",
        "group_size": f"{section}.num_generations_per_prompt",
        "global_batch": "policy.train_global_batch_size",
        "steps": f"{section}.max_num_steps",
        "epochs": f"{section}.max_num_epochs",
        "method": f"{lora}enabled",
        "rank": f"{lora}dim",
        "alpha": f"{lora}alpha",
        "dropout": f"{lora}dropout",
        "targets": f"{lora}target_modules",
    }
    enabled = options.flag(f"{lora}enabled")
    # What no file says is off, if all files are there.
    method: Method | None = "lora" if enabled else "fullft" if enabled is False or not missing else None
    batch, group = options.count(keys["global_batch"]), options.count(keys["group_size"])
    if product := re.fullmatch(r"\$\{mul: *(\d+), *(\d+)\}", str(options.get(keys["global_batch"]))):
        batch = int(product[1]) * int(product[2])
    steps = options.number(keys["steps"])
    steps = steps if steps and 0 < steps < _NO_LIMIT else None
    prompts = options.count(f"{section}.num_prompts_per_step")
    if steps and batch and group and prompts:  # a step of RL is one or more of the optimizer
        steps *= max(1.0, prompts * group / batch)
    if task == "rl" and batch and group and batch % group == 0:
        batch //= group
    else:
        group = None
    if options.number(keys["epochs"]) == -1:  # they have no end, so the number is none to check
        del keys["epochs"]
    targets = options.names(keys["targets"])
    if options.get(f"{lora}exclude_modules"):
        targets = None
    elif options.flag(f"{lora}match_all_linear"):
        targets = ("all-linear",)
    per_node, nodes = options.count("cluster.gpus_per_node"), options.count("cluster.num_nodes")
    return [
        record(
            shown,
            "nemo-rl",
            options,
            keys,
            findings,
            lora=method == "lora",
            task=task,
            method=method,
            schedule=schedule,
            optimizer=(options.text(keys["optimizer"]) or "").rpartition(".")[2] or None,
            devices=None if per_node is None else per_node * (nodes or 1),
            group_size=group,
            global_batch=batch,
            steps=steps,
            targets=targets,
        )
    ]


def _read_file(path: Path, text: str, read: dict[str, tuple[Options, str] | None]) -> tuple[Options, str]:
    """Return the options of a file over those that it inherits, and a file to inherit from that is not there.

    Args:
        read: what is inherited from files that were read before, and null of those that are being read.
    """
    own = read_yaml(text, as_omegaconf=True)
    missing = ""
    bases = own.values.pop("defaults", [])
    merged = Options()
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []:
        file = os.path.realpath(path.parent / str(base))
        if not os.path.isfile(file):
            missing = missing or str(base)
            continue
        if file not in read:
            read[file] = None
            read[file] = _read_file(Path(file), Path(file).read_text(encoding="utf-8", errors="replace"), read)
        if (inherited := read[file]) is None:
            raise UserError("it inherits from itself")
        merged.update(Options(inherited[0].values))
        missing = missing or inherited[1]
    for name in [name for name in own.values if name.endswith("._override_")]:
        section = name.removesuffix("_override_")
        merged.values = {name: value for name, value in merged.values.items() if not name.startswith(section)}
    merged.update(own)
    return merged, missing
