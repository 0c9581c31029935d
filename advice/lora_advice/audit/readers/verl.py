"""verl: overrides on the command line of its trainers, and YAML files with the options of PPO and GRPO.

An optimizer step takes `ppo_mini_batch_size` prompts, each with `rollout.n` responses, so that this is the batch; a
step of verl, which counts `total_training_steps`, takes `train_batch_size` prompts and is one or more of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig
from lora_advice.audit.readers.options import CERTAIN, THE_FILE, Options, names_of, read_yaml, record
from lora_advice.audit.readers.shell import Word, cut_off, is_script, read_commands, read_overrides
from lora_advice.finding import Finding

_SFT_TRAINER = re.compile(r"(^|[./])(\w*sft_trainer\w*)(\.py)?$")
_DOTTED = re.compile(r"[+]*[\w@/]+\.[\w.@/]+=")
_RL_OPTION = re.compile(r"\bactor_rollout_ref\.(actor|model)\.")


def matches(path: Path, text: str) -> bool:
    """Return whether a script calls a trainer of verl, or a YAML file has its options."""
    if path.suffix in (".yaml", ".yml"):
        rl, sft, optim = (r"^actor_rollout_ref *:", r"^[ \t]+(partial_pretrain|total_epochs) *:", r"^optim *:")
        rl_there, *sft_there = (re.search(pattern, text, re.MULTILINE) is not None for pattern in (rl, sft, optim))
        return rl_there or all(sft_there)
    return is_script(path, text) and (_RL_OPTION.search(text) is not None or "sft_trainer" in text)


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return a run for each command that calls a trainer, or the run of a YAML file."""
    if path.suffix in (".yaml", ".yml"):
        options = read_yaml(text, as_omegaconf=True).resolved()
        config = _config(shown, "", options, "rl" if any(map(_RL_OPTION.match, options.values)) else "sft", [])
        return [] if config.lr is None and config.model is None and config.global_batch is None else [config]
    configs: list[TrainingConfig] = []
    commands = read_commands(text)
    for words, following in zip(commands, [*commands[1:], []], strict=True):
        options = read_overrides(words)
        task: Task | None = None
        if any(map(_RL_OPTION.match, options.values)):
            task = "rl"
        elif any(_SFT_TRAINER.search(word.text) for word in words) and options.values:
            task = "sft"
        if task is None or _DOTTED.match(words[0].text):
            continue
        cut = [cut_off(following[0])] if following and _DOTTED.match(following[0].text) else []
        configs.append(_config(shown, f"line {words[0].line}", options, task, cut, words))
    return configs


def _config(
    shown: str, name: str, options: Options, task: Task, findings: list[Finding], words: Sequence[Word] = ()
) -> TrainingConfig:
    keys = names_of(f"verl_{task}")
    ranks = keys["rank"].split()
    # Training may go on from an adapter, which has a rank of its own.
    continued = options.get(ranks[0].replace("lora_rank", "lora_adapter_path")) is not None
    method: Method | None = "fullft"
    if options.number(keys["rank"]) or continued:
        method = "lora"
    elif any(key in options and options.values[key] is None for key in ranks):
        method = None
    if method == "fullft" and words and not any(key in options for key in ranks):
        stated = [key for key in f"{keys['alpha']} {keys['targets']}".split() if options.get(key)]
        if stated:
            message = f"{stated[0]} has no effect: all weights are trained, since {ranks[0]} is 0 unless it is set"
            line = options.lines.get(stated[0])
            findings = [*findings, Finding("no-effect", "error", message, THE_FILE, CERTAIN, line=line)]
    steps = _positive(options, keys["steps"])
    said: dict[str, int | None] = {}
    if task == "rl":
        train, batch = options.count("data.train_batch_size"), options.count(keys["global_batch"])
        if steps is not None and train is not None and batch:
            steps *= max(1, train / batch)
        prompt, response = options.count("data.max_prompt_length"), options.count("data.max_response_length")
        said["max_length"] = None if prompt is None or response is None else prompt + response
    return record(
        shown,
        "verl",
        options,
        keys,
        findings,
        name=name,
        lora=method == "lora",
        task=task,
        method=method,
        steps=steps,
        epochs=options.number(keys["epochs"]) if steps is None else None,
        warmup=_positive(options, keys["warmup"]),
        devices=_devices(options, words),
        **said,
    )


def _positive(options: Options, names: str) -> float | None:
    """Return the first number above 0; verl has -1 for what is not set."""
    numbers = map(options.number, names.split())
    return next((number for number in numbers if number is not None and number > 0), None)


def _devices(options: Options, words: Sequence[Word]) -> int | None:
    per_node, nodes = options.count("trainer.n_gpus_per_node"), options.count("trainer.nnodes")
    for word in words:
        if match := re.fullmatch(r"--(nproc[-_]per[-_]node|nnodes)=(\d+)", word.text):
            if match[1] == "nnodes":
                nodes = int(match[2])
            else:
                per_node = int(match[2])
    return None if per_node is None else per_node * (nodes or 1)
