"""Commands of OpenRLHF, whose options have dotted names since version 0.10. DeepSpeed keeps an fp32 copy of weights.

The batch of a step counts responses, so that `n_samples_per_prompt` of them are one prompt.
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import count, flag, frameworks, number, record
from lora_advice.audit.readers.shell import UNKNOWN, Word, read_commands, read_flags

_PROGRAM = re.compile(r"\bopenrlhf[./]cli[./]train_(\w+?)(\.py)?$")


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the runs of a script's commands."""
    runs = []
    for words in read_commands(content):
        for place, word in enumerate(words):
            if program := _PROGRAM.search(word.text):
                runs.append(_run(path, words[place + 1 :], program[1], f"line {words[0].line}"))
                break
    return runs


def _run(path: Path, words: list[Word], program: str, name: str) -> TrainingConfig:
    table, options = frameworks()["openrlhf"], read_flags(words)
    task: Task | None = table["tasks"].get(program)
    if flag(options["model.pretrain_mode_enable pretrain_mode"]):
        task = "pretraining"
    keys = table["names"] | table["rl_names" if task == "rl" else "sft_names"]
    rank = number(options[keys["rank"]])
    method: Method | None = "lora" if rank else "fullft"
    # A variable that is not known may hold any options.
    if any(key in options and options[key] is None for key in keys["rank"].split()) or UNKNOWN in [
        word.text for word in words
    ]:
        method = None
    findings = []
    stated = [key for key in f"{keys['alpha']} {keys['targets']}".split() if options[key] is not None]
    if method == "fullft" and stated and rank is None:
        rule = keys["rank"].split()["." not in stated[0]]
        findings = [say("no-rank", options.lines.get(stated[0]), option=stated[0], rank=rule)]
    for field, value in table["defaults"].get(task, {}).items():
        if not any(key in options for key in keys[field].split()):
            options.values[keys[field].split()[0]] = value
    batch, group = count(options[keys["global_batch"]]), count(options[keys.get("group_size", "")]) or 1
    return record(
        path,
        "openrlhf",
        options,
        keys,
        findings,
        name=name,
        lora=method == "lora",
        task=task,
        method=method,
        bits=4 if flag(options["ds.load_in_4bit load_in_4bit"]) else None,
        group_size=group if task == "rl" else None,
        global_batch=None if batch is None or batch % group else batch // group,
    )
