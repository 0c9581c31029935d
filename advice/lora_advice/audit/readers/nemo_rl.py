"""NVIDIA NeMo-RL: its YAML files, with the files that they inherit from, and scripts that call its programs.

`policy.megatron_cfg.enabled` decides whether the options of Megatron count or those of the other backend (DTensor).
An optimizer step takes `train_global_batch_size` examples, which are responses in RL. What a file inherits has no line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import CERTAIN, THE_FILE, Options, flatten, read_yaml, record
from lora_advice.audit.readers.shell import Word, find_file, is_script, read_commands, read_overrides
from lora_advice.errors import UserError
from lora_advice.finding import Finding

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
_PROGRAM = re.compile(rf"\brun_(?:vlm_)?({'|'.join(_TASKS)})\w*\.py$")
_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NO_LIMIT = 1e5
"""Steps that NeMo-RL's own files set where the epochs decide."""


def matches(path: Path, text: str) -> bool:
    """Return whether a YAML file has NeMo-RL's sections, or a script calls one of its programs with overrides."""
    if path.suffix in (".yaml", ".yml"):
        return _SECTION.search(text) is not None and _BASE.search(text) is not None
    return is_script(path, text) and re.search(_PROGRAM.pattern.removesuffix("$"), text) is not None


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the run of a YAML file, or a run for each command that names a file or options of the policy."""
    if path.suffix in (".yaml", ".yml"):
        options, missing = _read_file(path, text, {})
        if not any(name.startswith("policy.") for name in options.values):
            return []
        note = f"{missing}, from which the file inherits, is not there: what it sets is not known"
        findings = [Finding("not-read", "note", note, THE_FILE, CERTAIN)] if missing else []
        return [_config(shown, "", options, "", findings, whole=not missing)]
    configs = (_from_command(path, shown, words) for words in read_commands(text))
    return [config for config in configs if config is not None]


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


def _from_command(path: Path, shown: str, words: list[Word]) -> TrainingConfig | None:
    programs = [(at, match[1]) for at, word in enumerate(words) if (match := _PROGRAM.search(word.text))]
    if not programs:
        return None
    program, section = programs[0]
    arguments = words[program + 1 :]
    overrides = read_overrides(arguments)
    options, whole = Options(), False
    for at, word in enumerate(arguments):
        name, _, value = word.text.partition("=")
        following = "" if at + 1 == len(arguments) else arguments[at + 1].text
        if name == "--config" and (file := find_file(path, value or following)):
            options, missing = _read_file(file, file.read_text(encoding="utf-8", errors="replace"), {})
            options.lines, whole = {}, not missing
    if not options.values and not any(name.startswith("policy.") for name in overrides.values):
        return None
    options.update(overrides)
    return _config(shown, f"line {words[0].line}", options, section, [], whole=whole)


def _config(
    shown: str, name: str, options: Options, section: str, findings: list[Finding], whole: bool
) -> TrainingConfig:
    """Make a record; `whole` says that all files of options are there, so that what they do not say is off."""
    options = options.resolved()
    section = section or next((s for s in _TASKS if any(key.startswith(f"{s}.") for key in options.values)), "")
    task, megatron = _TASKS.get(section), options.flag("policy.megatron_cfg.enabled")
    if megatron is None and not whole:  # a file that is not there may set it
        of_megatron = ("policy.megatron_cfg.peft.", "policy.megatron_cfg.optimizer.")
        megatron = any(key.startswith(of_megatron) for key in options.values)
    lora, other = "policy.dtensor_cfg.lora_cfg.", "policy.megatron_cfg.peft."
    optimizer = {"lr": "policy.optimizer.kwargs.lr", "optimizer": "policy.optimizer.name"}
    if megatron:
        lora, other = other, lora
        section_of = "policy.megatron_cfg.optimizer"
        optimizer = {"lr": f"{section_of}.lr", "optimizer": f"{section_of}.optimizer"}
    keys = optimizer | {
        "model": "policy.model_name",
        "group_size": f"{section}.num_generations_per_prompt",
        "global_batch": "policy.train_global_batch_size",
        "steps": f"{section}.max_num_steps",
        "epochs": f"{section}.max_num_epochs",
        "max_length": "policy.max_total_sequence_length",
        "packing": "policy.sequence_packing.enabled",
        "precision": "policy.precision",
        "method": f"{lora}enabled",
        "rank": f"{lora}dim",
        "alpha": f"{lora}alpha",
        "dropout": f"{lora}dropout",
        "targets": f"{lora}target_modules",
    }
    enabled = options.flag(f"{lora}enabled")
    method: Method | None = "lora" if enabled else "fullft" if enabled is False or whole else None
    batch, group = options.count(keys["global_batch"]), options.count(keys["group_size"])
    if product := re.fullmatch(r"\$\{mul: *(\d+), *(\d+)\}", str(options.get(keys["global_batch"]))):
        batch = int(product[1]) * int(product[2])
    steps = options.number(keys["steps"])
    steps = None if steps is None or not 0 < steps < _NO_LIMIT else steps
    epochs, prompts = options.number(keys["epochs"]), options.count(f"{section}.num_prompts_per_step")
    if steps and batch and group and prompts:  # a step of RL is one or more of the optimizer
        steps *= max(1.0, prompts * group / batch)
    if task == "rl" and batch and group and batch % group == 0:
        batch //= group
    else:
        group = None
    if method != "lora":
        findings = findings + _without_effect(options, lora, other, bool(megatron), method)
    per_node, nodes = options.count("cluster.gpus_per_node"), options.count("cluster.num_nodes")
    schedule, warmup = _schedule(options, bool(megatron))
    return record(
        shown,
        "nemo-rl",
        options,
        # -1 epochs have no end.
        keys if epochs != -1 else {**keys, "epochs": ""},
        findings,
        name=name,
        lora=method == "lora",
        task=task,
        method=method,
        precision=_PRECISIONS.get(options.text("policy.precision") or ""),
        schedule=schedule,
        warmup=warmup,
        optimizer=(options.text(keys["optimizer"]) or "").rpartition(".")[2] or None,
        devices=None if per_node is None else per_node * (nodes or 1),
        group_size=group,
        global_batch=batch,
        steps=steps,
        epochs=epochs,
        targets=_targets(options, lora),
    )


def _schedule(options: Options, megatron: bool) -> tuple[str | None, float | None]:
    if megatron:
        warmup = options.number("policy.megatron_cfg.scheduler.lr_warmup_iters")
        return options.text("policy.megatron_cfg.scheduler.lr_decay_style"), warmup
    parts = options.get("policy.scheduler")
    schedule, warmup = None, None
    for part in parts if isinstance(parts, list) else []:
        of_part = Options(flatten(part) if isinstance(part, dict) else {})
        if name := of_part.text("name"):
            schedule = name.rpartition(".")[2]
            if schedule == "LinearLR" and (of_part.number("kwargs.start_factor") or 1) < 1:
                warmup = of_part.number("kwargs.total_iters")
    return schedule, warmup


def _targets(options: Options, lora: str) -> tuple[str, ...] | None:
    if options.get(f"{lora}exclude_modules"):
        return None
    if options.flag(f"{lora}match_all_linear"):
        return ("all-linear",)
    return options.names(f"{lora}target_modules") or None


def _without_effect(options: Options, lora: str, other: str, megatron: bool, method: Method | None) -> list[Finding]:
    if options.flag(f"{other}enabled"):
        active = "policy.megatron_cfg" if megatron else "policy.dtensor_cfg"
        message = f"{other}enabled has no effect, since the run uses {active}: all weights are trained"
    elif method == "fullft" and f"{lora}dim" in options.lines and f"{lora}enabled" not in options.lines:
        message = f"{lora}dim has no effect, since {lora}enabled is off: all weights are trained"
    else:
        return []
    line = options.lines.get(f"{other}enabled" if options.flag(f"{other}enabled") else f"{lora}dim")
    return [Finding("no-effect", "error", message, THE_FILE, CERTAIN, line=line)]
