"""TRL and transformers: command lines, YAML for `--config`, and calls in Python files and notebooks.

A record states what the file states. Where the program is one of TRL's own, or a class is called in Python, what is not
said has the default of the class, and no line. Of another program, and of a YAML file, to which a command may add
options, what is not said is not known. LoRA is off in TRL's own programs and in a YAML file unless `use_peft` is on.

TRL makes a number of a learning rate that YAML reads as text, such as `2e-4`, so `lr-text` is not found here.
transformers' own `parse_yaml_file` keeps the text, and torch's optimizer then stops with a TypeError.
"""

from __future__ import annotations

import ast
import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers import trl_python
from lora_advice.audit.readers.options import Options, at, defaults, examples, names_of, read_yaml, record
from lora_advice.audit.readers.shell import UNKNOWN, Word, find_file, is_script, read_commands, read_flags
from lora_advice.audit.readers.trl_python import plain_fields, task_of
from lora_advice.errors import UserError
from lora_advice.finding import Level

_COMMANDS = ("sft", "grpo", "dpo", "kto", "reward", "rloo", "distillation")
_OPTIONS = ("model_name_or_path", "per_device_train_batch_size", "use_peft")
"""A command or a YAML file with one of these is of TRL or transformers, unless it is of a framework below."""
_TRAINING = ("learning_rate", "per_device_train_batch_size", "use_peft", "lora_r", "num_train_epochs", "max_steps")
"""A command of an other program than TRL's own is a training run if it has one of these."""
_OTHER_FRAMEWORKS = ("finetuning_type", "stage", "base_model", "cutoff_len", "template")
_TASK_OPTIONS: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("rl", ("num_generations", "reward_funcs", "reward_weights")),
    ("sft", ("packing", "assistant_only_loss", "completion_only_loss", "dataset_text_field")),
)
"""Options that only one task has."""
_IN_TEXT = re.compile(r"\s*(?:\$ )?(?:[A-Z_]+=\S+\s+)*(?:trl|accelerate|python3?|torchrun|uv|hf|deepspeed)\s")
_COMMAND = re.compile(
    rf"--({'|'.join(name.replace('_', '[_-]') for name in _OPTIONS)})\b|\btrl ({'|'.join(_COMMANDS)})\b"
)
_YAML = re.compile(rf"^({'|'.join(_OPTIONS)}) *:", re.MULTILINE)
_OTHER_YAML = re.compile(rf"^({'|'.join(_OTHER_FRAMEWORKS)}) *:", re.MULTILINE)


def matches(path: Path, text: str) -> bool:
    """Return whether a file has options, a command or calls of TRL or transformers."""
    if path.suffix in (".yaml", ".yml"):
        return _YAML.search(text) is not None and _OTHER_YAML.search(text) is None
    if path.suffix in (".py", ".ipynb"):
        return trl_python.CALL.search(text) is not None or _COMMAND.search(text) is not None
    return is_script(path, text) and _COMMAND.search(text) is not None


def read(path: Path, shown: str, text: str) -> list[TrainingConfig]:
    """Return the runs that a file states."""
    if path.suffix in (".yaml", ".yml"):
        options = read_yaml(text)
        task, _ = task_of(path.stem, *(parent.name for parent in path.absolute().parents[:2]))
        if task is None:
            task = next((task for task, names in _TASK_OPTIONS if any(name in options for name in names)), None)
        config, datasets = _config(path, shown, "", options, task, "yaml"), options.get("datasets")
        if not options.flag("packing") and isinstance(datasets, list):
            files = [at(dataset, "data_files") for dataset in datasets]
            config = replace(config, examples=examples(path, files))
        return [config]
    if path.suffix == ".ipynb":
        code, numbers = _notebook(text)
        return trl_python.read(shown, trl_python.parse(code), numbers)
    if path.suffix != ".py":
        return _from_commands(path, shown, read_commands(text))
    tree, lines, configs = trl_python.parse(text), text.splitlines(), list[TrainingConfig]()
    for node in tree.body:  # commands in strings that stand as statements, such as the docstring
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            configs += _in_text(path, shown, lines[: node.end_lineno], node.lineno - 1)
    return configs + trl_python.read(shown, tree, range(1, text.count("\n") + 2))


def _in_text(path: Path, shown: str, lines: list[str], start: int) -> list[TrainingConfig]:
    """Read the commands that stand in a text, each from a line that begins as one to the last that is continued."""
    configs = []
    while start < len(lines):
        end = start + 1
        if _IN_TEXT.match(lines[start]):
            while end < len(lines) and lines[end - 1].rstrip().endswith("\\"):
                end += 1
            while end < len(lines) and re.match(r"\s*--[a-z]", lines[end]):  # the backslash is missing
                end += 1
            block = "\n".join(lines[start:end]).strip().removeprefix("$ ")
            block = re.sub(r"<\w[^<>\n]*>", UNKNOWN, block)
            configs += _from_commands(path, shown, read_commands(block, start + 1))
        start = end
    return configs


def _notebook(text: str) -> tuple[str, list[int]]:
    """Return the code of the cells of a notebook that are Python, and for each of its lines that of the file.

    Lines for IPython or the shell become empty.
    """
    try:
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        sources = ["".join(source) for source in cells]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError("it is not a notebook with cells") from error
    code, lines, place, number = "", list[int](), 0, 1
    for source in sources:
        plain = re.sub(r"^[ \t]*[%!].*$", "", source, flags=re.MULTILINE)
        with suppress(UserError):
            trl_python.parse(plain)
            code += plain + "\n"
            for line in source.split("\n"):
                if (found := text.find(json.dumps(line, ensure_ascii=False)[1:-1], place)) >= 0:
                    number += text.count("\n", place, found)
                    place = found
                lines.append(number)
    return code, lines


def _from_commands(path: Path, shown: str, commands: list[list[Word]]) -> list[TrainingConfig]:
    configs = []
    before = None
    for words in commands:
        if before is not None and words[0].text.startswith("--"):
            configs[-1] = before = replace(
                before, findings=(*before.findings, say("cut-off", words[0].line, word=words[0].text))
            )
        elif (before := _from_command(path, shown, words)) is not None:
            configs.append(before)
    return configs


def _from_command(path: Path, shown: str, words: list[Word]) -> TrainingConfig | None:
    texts = [word.text for word in words]
    start, name, own = -1, "", False
    for place, (text, following) in enumerate(zip(texts, [*texts[1:], ""], strict=True)):
        if (text == "trl" and following in _COMMANDS) or (text == "-m" and following.startswith("trl.scripts.")):
            start, name, own = place + 1, following.removeprefix("trl.scripts."), True
        elif text.endswith(".py"):
            start, name = place, Path(text).stem
            own = name in _COMMANDS or "examples/scripts/" in text
            program = find_file(path, text)
            if program is not None and "ModelConfig" not in program.read_text(encoding="utf-8", errors="replace"):
                own = False  # only its name is that of a program of TRL
        if start >= 0:
            break
    launcher, options = read_flags(words[:start]), read_flags(words[start + 1 :])
    from_file = _named_file(path, options.text("config"))
    from_file.update(options)
    options = from_file
    trained = texts[start - 1] in ("trl", "-m") or any(name in options for name in _TRAINING)
    if start < 0 or not options.values or not trained or any(option in options for option in _OTHER_FRAMEWORKS):
        return None
    options.fill(launcher.values)
    for before, text in zip(texts[start + 1 :], texts[start + 2 :], strict=False):
        if text == UNKNOWN and (not before.startswith("--") or "=" in before):
            # A variable that is not known may hold any options.
            options.fill({"use_peft": None})
    return _config(
        path, shown, f"line {words[0].line}", options, task_of(name)[0], "command" if own else "script", name
    )


def _named_file(path: Path, said: str | None) -> Options:
    """Return the options of another file that a command names, without lines; none if it is no such file."""
    file = None if said is None else find_file(path, said)
    if file is not None:
        with suppress(UserError):
            return Options(read_yaml(file.read_text(encoding="utf-8", errors="replace")).values)
    return Options()


def _config(
    path: Path, shown: str, name: str, options: Options, task: Task | None, kind: str, program: str = ""
) -> TrainingConfig:
    """Make a record; `kind` is `command` for one of TRL's own, `script` for an other script, or `yaml`."""
    peft = options.flag("use_peft")
    if peft is None and "use_peft" not in options and kind != "script":
        peft = False
    method: Method | None = None if peft is None else "lora" if peft else "fullft"
    findings = []
    first = next((option for option in names_of("trl_lora").values() if option in options), None)
    if method == "fullft" and first is not None:
        text = "no-peft-in-yaml" if kind == "yaml" else "no-peft"
        findings.append(say(text, options.lines.get(first), option=first))
    targets = options.names("lora_target_modules") if method != "fullft" else None
    if kind == "script" and targets is not None and len(targets) == 1:  # another program may take them as one text
        targets = tuple(name for name in targets[0].split(",") if name)
    if with_comma := [target for target in targets or () if "," in target]:
        level: Level = "warning" if kind == "script" else "error"
        sure = "certain unless the program removes the commas" if kind == "script" else "certain"
        line = options.lines.get("lora_target_modules")
        findings.append(say("commas", line, level=level, names=" ".join(with_comma), sure=sure))
    if kind == "command":
        config_class = f"{task_of(program)[1]}config"
        options.fill(next((own for made, own in defaults().items() if made.lower() == config_class), {}))
        if method == "lora":
            options.fill(defaults()["ModelConfig"])
    processes, per_node = options.count("num_processes"), options.count("nproc_per_node")
    if processes is None and per_node is not None:
        processes = per_node * (options.count("nnodes") or 1)
    if processes is None:
        processes = _named_file(path, options.text("config_file accelerate_config")).count("num_processes")
    return record(
        shown,
        "trl",
        options,
        # Python's command lines take the beginning of an option for it, and other programs have a shorter name.
        names_of("trl") | names_of("trl_lora") | {"model": "model_name_or_path model_name", "method": "use_peft"},
        findings,
        name=name,
        task=task,
        method=method,
        bits=4 if options.flag("load_in_4bit") else 8 if options.flag("load_in_8bit") else None,
        devices=processes,
        targets=targets,
        **plain_fields(options, task),
    )
