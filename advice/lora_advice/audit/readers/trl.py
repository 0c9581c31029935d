"""TRL and transformers: command lines, YAML for `--config`, and calls in Python files.

A record states what the file states. Where the program is one of TRL's own, or a class is called in Python, what is not
said has the default of the class, and no line. Of another program, and of a YAML file, to which a command may add
options, what is not said is not known. LoRA is off in TRL's own programs and in a YAML file unless `use_peft` is on.

TRL makes a number of a learning rate that YAML reads as text, such as `2e-4`, so `lr-text` is not found here.
transformers' own `parse_yaml_file` keeps the text, and torch's optimizer then stops with a TypeError.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers import trl_python
from lora_advice.audit.readers.options import Options, examples, frameworks, read_yaml, record
from lora_advice.audit.readers.shell import UNKNOWN, Word, find_file, read_commands, read_flags
from lora_advice.audit.readers.trl_python import plain_fields, task_of
from lora_advice.audit.readers.values import at, count, flag, names, text
from lora_advice.errors import UserError
from lora_advice.finding import Level

_COMMANDS = ("sft", "grpo", "dpo", "kto", "reward", "rloo", "distillation")
_TRAINING = ("learning_rate", "per_device_train_batch_size", "use_peft", "lora_r", "num_train_epochs", "max_steps")
"""A command of an other program than TRL's own is a training run if it has one of these."""
_OTHER_FRAMEWORKS = ("finetuning_type", "stage", "base_model", "cutoff_len", "template")
_TASK_OPTIONS: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("rl", ("num_generations", "reward_funcs", "reward_weights")),
    ("sft", ("packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field")),
)
"""Options that only one task has."""


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the runs that a file states."""
    if path.suffix == ".py":
        return trl_python.read(path, content)
    if path.suffix in (".yaml", ".yml"):
        options = read_yaml(content)
        task, _ = task_of(path.stem, *(parent.name for parent in path.absolute().parents[:2]))
        if task is None:
            task = next((task for task, names in _TASK_OPTIONS if any(name in options for name in names)), None)
        config, datasets = _config(path, "", options, task, "yaml"), options["datasets"]
        if not flag(options["packing"]) and isinstance(datasets, list):
            files = [at(dataset, "data_files") for dataset in datasets]
            config = replace(config, examples=examples(path, files))
        return [config]
    configs, before = list[TrainingConfig](), None
    for words in read_commands(content):
        if before is not None and words[0].text.startswith("--"):
            cut = say("cut-off", words[0].line, word=words[0].text)
            configs[-1] = before = replace(before, findings=(*before.findings, cut))
        elif (before := _from_command(path, words)) is not None:
            configs.append(before)
    return configs


def _from_command(path: Path, words: list[Word]) -> TrainingConfig | None:
    texts = [word.text for word in words]
    start, name, own = -1, "", False
    for place, (word, following) in enumerate(zip(texts, [*texts[1:], ""], strict=True)):
        if (word == "trl" and following in _COMMANDS) or (word == "-m" and following.startswith("trl.scripts.")):
            start, name, own = place + 1, following.removeprefix("trl.scripts."), True
        elif word.endswith(".py"):
            start, name = place, Path(word).stem
            own = name in _COMMANDS or "examples/scripts/" in word
            program = find_file(path, word)
            if program is not None and "ModelConfig" not in program.read_text(encoding="utf-8", errors="replace"):
                own = False  # only its name is that of a program of TRL
        if start >= 0:
            break
    launcher, said = read_flags(words[:start]), read_flags(words[start + 1 :])
    options = _named_file(path, said["config"])
    options.values |= said.values
    options.lines |= said.lines
    trained = texts[start - 1] in ("trl", "-m") or any(name in options for name in _TRAINING)
    if start < 0 or not options.values or not trained or any(option in options for option in _OTHER_FRAMEWORKS):
        return None
    options.fill(launcher.values)
    for before, word in zip(texts[start + 1 :], texts[start + 2 :], strict=False):
        if word == UNKNOWN and (not before.startswith("--") or "=" in before):
            # A variable that is not known may hold any options.
            options.fill({"use_peft": None})
    return _config(path, f"line {words[0].line}", options, task_of(name)[0], "command" if own else "script", name)


def _named_file(path: Path, said: object) -> Options:
    """Return the options of another file that a command names, without lines; none if it is no such file."""
    file = find_file(path, text(said) or "")
    if file is not None:
        with suppress(UserError):
            return Options(read_yaml(file.read_text(encoding="utf-8", errors="replace")).values)
    return Options()


def _config(path: Path, name: str, options: Options, task: Task | None, kind: str, program: str = "") -> TrainingConfig:
    """Make a record; `kind` is `command` for one of TRL's own, `script` for an other script, or `yaml`."""
    table, peft = frameworks()["trl"], flag(options["use_peft"])
    if peft is None and "use_peft" not in options and kind != "script":
        peft = False
    method: Method | None = None if peft is None else "lora" if peft else "fullft"
    findings = []
    first = next((option for option in table["lora_names"].values() if option in options), None)
    if method == "fullft" and first is not None:
        rule = "no-peft-in-yaml" if kind == "yaml" else "no-peft"
        findings.append(say(rule, options.lines.get(first), option=first))
    targets = names(options["lora_target_modules"]) if method != "fullft" else None
    if kind == "script" and targets is not None and len(targets) == 1:  # another program may take them as one text
        targets = tuple(name for name in targets[0].split(",") if name)
    if with_comma := [target for target in targets or () if "," in target]:
        level: Level = "warning" if kind == "script" else "error"
        sure = "certain unless the program removes the commas" if kind == "script" else "certain"
        line = options.lines.get("lora_target_modules")
        findings.append(say("commas", line, level=level, names=" ".join(with_comma), sure=sure))
    if kind == "command":
        defaults, config_class = table["defaults"], f"{task_of(program)[1]}config"
        options.fill(next((own for made, own in defaults.items() if made.lower() == config_class), {}))
        options.fill(defaults["ModelConfig"] if method == "lora" else {})
    processes, per_node = count(options["num_processes"]), count(options["nproc_per_node"])
    if processes is None and per_node is not None:
        processes = per_node * (count(options["nnodes"]) or 1)
    if processes is None:
        processes = count(_named_file(path, options["config_file accelerate_config"])["num_processes"])
    return record(
        path,
        "trl",
        options,
        # Python's command lines take the beginning of an option for it, and other programs have a shorter name.
        table["names"] | table["lora_names"] | {"model": "model_name_or_path model_name", "method": "use_peft"},
        findings,
        name=name,
        task=task,
        method=method,
        bits=4 if flag(options["load_in_4bit"]) else 8 if flag(options["load_in_8bit"]) else None,
        devices=processes,
        targets=targets,
        **plain_fields(options, task),
    )
