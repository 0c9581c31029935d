"""verl: overrides on the command line of its trainers, and YAML files with the options of PPO and GRPO.

An optimizer step takes `ppo_mini_batch_size` prompts, each with `rollout.n` responses, so that this is the batch; a
step of verl, which counts `total_training_steps`, takes `train_batch_size` prompts and is one or more of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lora_advice.audit.config import Method, TrainingConfig, say
from lora_advice.audit.readers.options import Options, count, frameworks, number, read_yaml, record, text
from lora_advice.audit.readers.shell import UNKNOWN, Word, read_commands, read_overrides
from lora_advice.finding import Finding

_SFT_TRAINER = re.compile(r"(^|[./])(\w*sft_trainer\w*)(\.py)?$")
_DOTTED = re.compile(r"[+]*[\w@/]+\.[\w.@/]+=")
_RL_OPTION = re.compile(r"\bactor_rollout_ref\.(actor|model)\.")


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return a run for each command that calls a trainer, or the run of a YAML file."""
    if path.suffix in (".yaml", ".yml"):
        config = _config(path, read_yaml(content, as_omegaconf=True), (), [])
        return [] if config.lr is None and config.model is None and config.global_batch is None else [config]
    configs: list[TrainingConfig] = []
    commands = read_commands(content)
    for words, following in zip(commands, [*commands[1:], []], strict=True):
        options = read_overrides(words)
        rl, sft = map(_RL_OPTION.match, options.values), (_SFT_TRAINER.search(word.text) for word in words)
        if (any(rl) or (options.values and any(sft))) and not _DOTTED.match(words[0].text):
            cut = []
            if following and _DOTTED.match(following[0].text):
                cut = [say("cut-off", following[0].line, word=following[0].text)]
            configs.append(_config(path, options, words, cut))
    return configs


def _config(path: Path, options: Options, words: Sequence[Word], findings: list[Finding]) -> TrainingConfig:
    """Return the run of a command, or of a file, which has no words."""
    rl, table = any(map(_RL_OPTION.match, options.values)), frameworks()["verl"]
    keys = table["names"] | table["rl_names" if rl else "sft_names"]
    ranks, texts = keys["rank"].split(), [word.text for word in words]
    method: Method | None = "fullft"
    # Training may go on from an adapter, which has a rank of its own.
    if number(options[keys["rank"]]) or options[ranks[0].replace("lora_rank", "lora_adapter_path")] is not None:
        method = "lora"
    elif any(key in options and options.values[key] is None for key in ranks) or UNKNOWN in texts:
        # A variable that is not known may hold any options.
        method = None
    stated = [key for key in f"{keys['alpha']} {keys['targets']}".split() if options[key]]
    if method == "fullft" and words and stated and not any(key in options for key in ranks):
        findings = [*findings, say("no-rank", options.lines.get(stated[0]), option=stated[0], rank=ranks[0])]
    # verl has -1 for what is not set.
    steps = number(options[keys["steps"]]) or 0
    train, batch = count(options["data.train_batch_size"]), count(options[keys["global_batch"]])
    epochs = None if steps > 0 else number(options[keys["epochs"]])
    if rl and train and batch:
        steps *= max(1, train / batch)
    elif rl and keys["global_batch"] in options:
        steps = 0
    per_node, nodes = count(options["trainer.n_gpus_per_node"]), count(options["trainer.nnodes"])
    for word in texts:
        if match := re.fullmatch(r"--nproc[-_]per[-_]node=(\d+)", word):
            per_node = int(match[1])
        elif match := re.fullmatch(r"--nnodes=(\d+)", word):
            nodes = int(match[1])
    return record(
        path,
        "verl",
        options,
        keys,
        findings,
        name=f"line {words[0].line}" if words else "",
        lora=method == "lora",
        task="rl" if rl else "sft",
        method=method,
        # Megatron keeps an fp32 copy. The options `dtype` and `mixed_precision` say in which precision FSDP computes.
        rounded=text(options[keys["rounded"]]) in ("bf16", "bfloat16")
        and options["actor_rollout_ref.actor.strategy"] != "megatron"
        and not re.search(r"bf16_stochastic_round\W+true", str(options.values), re.IGNORECASE),
        steps=steps if steps > 0 else None,
        epochs=epochs,
        devices=None if per_node is None else per_node * (nodes or 1),
    )
