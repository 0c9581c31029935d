"""verl: overrides on the command line of its trainers, and YAML files with the options of PPO and GRPO.

An optimizer step takes `ppo_mini_batch_size` prompts, each with `rollout.n` responses, so that this is the batch; a
step of verl, which counts `total_training_steps`, takes `train_batch_size` prompts and is one or more of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.flat import Options
from lora_advice.audit.readers.hydra import read_overrides, read_yaml, resolved
from lora_advice.audit.readers.options import CERTAIN, THE_FILE, checked
from lora_advice.audit.readers.shell import Word, cut_off, is_script, read_commands
from lora_advice.finding import Finding

_RL = {
    "model": ("actor_rollout_ref.model.path",),
    "lr": ("actor_rollout_ref.actor.optim.lr",),
    "schedule": (
        "actor_rollout_ref.actor.optim.lr_scheduler_type",
        "actor_rollout_ref.actor.optim.warmup_style",
        "actor_rollout_ref.actor.optim.lr_decay_style",
    ),
    "optimizer": ("actor_rollout_ref.actor.optim.optimizer",),
    "group_size": ("actor_rollout_ref.rollout.n",),
    "global_batch": ("actor_rollout_ref.actor.ppo_mini_batch_size",),
    "steps": ("trainer.total_training_steps",),
    "epochs": ("trainer.total_epochs",),
    "rank": ("actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora.rank"),
    "adapter": ("actor_rollout_ref.model.lora_adapter_path",),
    "alpha": ("actor_rollout_ref.model.lora_alpha", "actor_rollout_ref.model.lora.alpha"),
    "dropout": ("actor_rollout_ref.model.lora.dropout",),
    "targets": ("actor_rollout_ref.model.target_modules", "actor_rollout_ref.model.lora.target_modules"),
    "warmup": ("actor_rollout_ref.actor.optim.lr_warmup_steps", "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio"),
}
_SFT = {
    "model": ("model.partial_pretrain", "model.path"),
    "lr": ("optim.lr",),
    "schedule": ("optim.lr_scheduler", "optim.lr_scheduler_type", "optim.lr_decay_style"),
    "optimizer": ("optim.optimizer",),
    "global_batch": ("data.train_batch_size",),
    "steps": ("trainer.total_training_steps",),
    "epochs": ("trainer.total_epochs",),
    "max_length": ("data.max_length",),
    "rank": ("model.lora_rank", "model.lora.rank"),
    "adapter": ("model.lora_adapter_path",),
    "alpha": ("model.lora_alpha", "model.lora.alpha"),
    "dropout": ("model.lora.dropout",),
    "targets": ("model.target_modules", "model.lora.target_modules"),
    "warmup": ("optim.lr_warmup_steps", "optim.lr_warmup_steps_ratio", "optim.warmup_steps_ratio"),
}
_SFT_TRAINER = re.compile(r"(^|[./])(\w*sft_trainer\w*)(\.py)?$")
_DOTTED = re.compile(r"[+]*[\w@/]+\.[\w.@/]+=")
_RL_OPTION = re.compile(r"\bactor_rollout_ref\.(actor|model)\.")


def matches(path: Path, text: str) -> bool:
    """Return whether a script calls a trainer of verl, or a YAML file has its options."""
    if path.suffix in (".yaml", ".yml"):
        sft = re.search(r"^[ \t]+(partial_pretrain|total_epochs) *:", text, re.MULTILINE)
        return re.search(r"^actor_rollout_ref *:", text, re.MULTILINE) is not None or (
            sft is not None and re.search(r"^optim *:", text, re.MULTILINE) is not None
        )
    return is_script(path, text) and (_RL_OPTION.search(text) is not None or "sft_trainer" in text)


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return a run for each command that calls a trainer, or the run of a YAML file."""
    if path.suffix in (".yaml", ".yml"):
        options = resolved(read_yaml(text))
        config = _config(shown, "", options, "rl" if any(map(_RL_OPTION.match, options.values)) else "sft", ())
        return [] if config.lr is None and config.model is None and config.global_batch is None else [config]
    configs = []
    commands = read_commands(text)
    for at, words in enumerate(commands):
        options = read_overrides(words)
        task: Task | None = None
        if any(map(_RL_OPTION.match, options.values)):
            task = "rl"
        elif any(_SFT_TRAINER.search(word.text) for word in words) and options.values:
            task = "sft"
        if task is None or _DOTTED.match(words[0].text):
            continue
        rest = commands[at + 1] if at + 1 < len(commands) else []
        cut = (cut_off(rest[0]),) if rest and _DOTTED.match(rest[0].text) else ()
        configs.append(_config(shown, f"line {words[0].line}", options, task, words, cut))
    return configs


def _config(
    shown: str, name: str, options: Options, task: Task, words: list[Word] | tuple[()], cut: tuple[Finding, ...] = ()
) -> TrainingConfig:
    keys = _RL if task == "rl" else _SFT
    rank = options.count(*keys["rank"])
    said_unknown = any(key in options and options.values[key] is None for key in keys["rank"])
    # Training may go on from an adapter, which has a rank of its own.
    continued = options.get(*keys["adapter"]) is not None
    method: Method | None = "lora" if options.number(*keys["rank"]) or continued else None if said_unknown else "fullft"
    fields: dict[str, Any] = {
        field: options.text(*keys[field]) for field in ("model", "schedule", "optimizer") if field in keys
    }
    fields |= {
        field: options.count(*keys[field]) for field in ("group_size", "global_batch", "max_length") if field in keys
    }
    fields |= {"lr": options.number(*keys["lr"]), "warmup": _positive(options, keys["warmup"])}
    fields["steps"] = _positive(options, keys["steps"])
    fields["epochs"] = options.number(*keys["epochs"]) if fields["steps"] is None else None
    if task == "rl":
        train = options.count("data.train_batch_size")
        if fields["steps"] is not None and train is not None and fields["global_batch"]:
            fields["steps"] *= max(1, train / fields["global_batch"])
        prompt, response = options.count("data.max_prompt_length"), options.count("data.max_response_length")
        fields["max_length"] = None if prompt is None or response is None else prompt + response
    findings = list(cut)
    if method == "lora":
        fields |= {
            "rank": rank,
            "alpha": options.number(*keys["alpha"]),
            "dropout": options.number(*keys["dropout"]),
            "targets": options.names(*keys["targets"]),
        }
    elif method == "fullft":
        stated = next((key for field in ("alpha", "targets") for key in keys[field] if options.get(key)), None)
        if stated is not None and words and not any(key in options for key in keys["rank"]):
            message = f"{stated} has no effect: all weights are trained, since {keys['rank'][0]} is 0 unless it is set"
            findings.append(Finding("no-effect", "error", message, THE_FILE, CERTAIN, line=options.lines.get(stated)))
    config = TrainingConfig(
        shown,
        "verl",
        name,
        task,
        method,
        devices=_devices(options, words),
        lines={field: line for field, line in options.lines_of(keys).items() if fields.get(field) is not None},
        findings=tuple(findings),
        **fields,
    )
    return checked(config, options.said(keys))


def _positive(options: Options, names: tuple[str, ...]) -> float | None:
    """Return the first number above 0; verl has -1 for what is not set."""
    numbers = (options.number(name) for name in names)
    return next((number for number in numbers if number is not None and number > 0), None)


def _devices(options: Options, words: list[Word] | tuple[()]) -> int | None:
    per_node, nodes = options.count("trainer.n_gpus_per_node"), options.count("trainer.nnodes")
    launcher = {
        match[1]: int(match[2])
        for word in words
        if (match := re.fullmatch(r"--(nproc[-_]per[-_]node|nnodes)=(\d+)", word.text))
    }
    per_node = next((count for name, count in launcher.items() if name.startswith("nproc")), per_node)
    nodes = launcher.get("nnodes", nodes)
    return None if per_node is None else per_node * (nodes or 1)
