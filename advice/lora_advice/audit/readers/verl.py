"""verl: overrides on the command line of its trainers, and YAML files with the options of PPO and GRPO.

An optimizer step takes `ppo_mini_batch_size` prompts, each with `rollout.n` responses, so that this is the batch; a
step of verl, which counts `total_training_steps`, takes `train_batch_size` prompts and is one or more of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import Options, names_of, read_yaml, record
from lora_advice.audit.readers.shell import UNKNOWN, Word, is_script, read_commands, read_overrides
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
        config = _config(shown, options, "rl" if any(map(_RL_OPTION.match, options.values)) else "sft", (), [])
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
        if task is not None and not _DOTTED.match(words[0].text):
            after = following[0] if following and _DOTTED.match(following[0].text) else None
            cut = [] if after is None else [say("cut-off", after.line, word=after.text)]
            configs.append(_config(shown, options, task, words, cut))
    return configs


def _config(shown: str, options: Options, task: Task, words: Sequence[Word], findings: list[Finding]) -> TrainingConfig:
    """Return the run of a command, or of a file, which has no words."""
    keys = names_of(f"verl_{task}")
    ranks, texts = keys["rank"].split(), [word.text for word in words]
    method: Method | None = "fullft"
    # Training may go on from an adapter, which has a rank of its own.
    if options.number(keys["rank"]) or options.get(ranks[0].replace("lora_rank", "lora_adapter_path")) is not None:
        method = "lora"
    elif any(key in options and options.values[key] is None for key in ranks) or UNKNOWN in texts:
        # A variable that is not known may hold any options.
        method = None
    stated = [key for key in f"{keys['alpha']} {keys['targets']}".split() if options.get(key)]
    if method == "fullft" and words and stated and not any(key in options for key in ranks):
        findings = [*findings, say("no-rank", options.lines.get(stated[0]), option=stated[0], rank=ranks[0])]
    # verl has -1 for what is not set.
    steps = next((steps for name in keys["steps"].split() if (steps := options.number(name) or 0) > 0), None)
    epochs = options.number(keys["epochs"]) if steps is None else None
    if task == "rl":
        train, batch = options.count("data.train_batch_size"), options.count(keys["global_batch"])
        if steps is not None and train is not None and batch:
            steps *= max(1, train / batch)
        elif keys["global_batch"] in options:
            steps = None
    per_node, nodes = options.count("trainer.n_gpus_per_node"), options.count("trainer.nnodes")
    for text in texts:
        if match := re.fullmatch(r"--nproc[-_]per[-_]node=(\d+)", text):
            per_node = int(match[1])
        elif match := re.fullmatch(r"--nnodes=(\d+)", text):
            nodes = int(match[1])
    return record(
        shown,
        "verl",
        options,
        keys,
        findings,
        name=f"line {words[0].line}" if words else "",
        lora=method == "lora",
        task=task,
        method=method,
        steps=steps,
        epochs=epochs,
        devices=None if per_node is None else per_node * (nodes or 1),
    )
