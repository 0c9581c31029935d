"""TRL and transformers: command lines, YAML for `--config`, and calls in Python files.

A record states what the file states. Where the program is one of TRL's own, or a class is called in Python, what is not
said has the default of the class, and no line. Of another program, and of a YAML file, to which a command may add
options, what is not said is not known. LoRA is off in TRL's own programs and in a YAML file unless `use_peft` is on.

TRL makes a number of a learning rate that YAML reads as text, such as `2e-4`, so `lr-text` is not found here.
"""

from __future__ import annotations

import ast
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import Options, count, flag, frameworks, names, number, read_yaml, record, text
from lora_advice.audit.readers.shell import UNKNOWN, Word, find_file, read_commands, read_flags
from lora_advice.errors import UserError
from lora_advice.finding import Level

_COMMANDS = ("sft", "grpo", "dpo", "kto", "reward", "rloo", "distillation")
_TRAINING = ("learning_rate", "per_device_train_batch_size", "use_peft", "lora_r", "num_train_epochs", "max_steps")
"""A command of an other program than TRL's own is a training run if it has one of these."""
_OTHER_FRAMEWORKS = ("finetuning_type", "stage", "base_model", "cutoff_len", "template")


@dataclass(frozen=True)
class _Call:
    """A call in Python: what is called, and its arguments by name, of which `**` stands for unpacked ones."""

    function: str
    node: ast.Call
    arguments: dict[str, ast.expr]

    @property
    def name(self) -> str:
        """The last name of what is called."""
        return self.function.rpartition(".")[2]


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the runs that a file states."""
    if path.suffix == ".py":
        return _from_python(path, content)
    if path.suffix in (".yaml", ".yml"):
        options = read_yaml(content)
        task, _ = _task_of(path.stem, *(parent.name for parent in path.absolute().parents[:2]))
        if task is None:
            own = frameworks()["trl"]["task_options"].items()
            task = next((task for task, names in own if any(name in options for name in names)), None)
        return [_config(path, "", options, task, "yaml")]
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
    options, file = Options(), find_file(path, text(said["config"]) or "")
    if file is not None:
        with suppress(UserError):  # it is no such file
            options.values = read_yaml(file.read_text(encoding="utf-8", errors="replace")).values
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
    return _config(path, f"line {words[0].line}", options, _task_of(name)[0], "command" if own else "script", name)


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
        defaults, config_class = table["defaults"], f"{_task_of(program)[1]}config"
        options.fill(next((own for made, own in defaults.items() if made.lower() == config_class), {}))
        options.fill(defaults["ModelConfig"] if method == "lora" else {})
    processes, per_node = count(options["num_processes"]), count(options["nproc_per_node"])
    if processes is None and per_node is not None:
        processes = per_node * (count(options["nnodes"]) or 1)
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
        **_plain_fields(options, task),
    )


def _task_of(*names: str) -> tuple[Task | None, str]:
    """Return the task by the words of programs, classes or folders, and the word that says it."""
    for name in names:
        class_name = re.sub(r"(Config|Trainer)$", "", name)
        words = re.split(r"[^a-z]+", class_name.lower())
        for task, known in frameworks()["trl"]["tasks"].items():
            for word in known:
                if word in words or (class_name != name and words[-1].endswith(word)):
                    return task, word
    return None, ""


def _plain_fields(options: Options, task: Task | None) -> dict[str, Any]:
    """Return the fields of a record that are not what options of transformers and TRL alone say."""
    steps = number(options["max_steps"])
    # Steps count before epochs, also those of a variable that is not known.
    epochs_count = "max_steps" not in options or (steps is not None and steps <= 0)
    return {
        **({} if task == "rl" else {"group_size": None}),
        "steps": steps if steps is not None and steps > 0 else None,
        **({} if epochs_count else {"epochs": None}),
        "rounded": text(options["dtype torch_dtype"]) == "bfloat16",
    }


def _from_python(path: Path, content: str) -> list[TrainingConfig]:
    """Return a run for each call of a class of settings; nothing is executed.

    Literals count, and names that are assigned a literal once in the file. A file has one model and one LoRA, or these
    are not known.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = [*ast.walk(ast.parse(content))]
    except (SyntaxError, ValueError, MemoryError) as error:  # of what is nested deeply, the parser says the last
        raise UserError(f"it is not valid Python: {str(error) or 'it is nested too deeply'}") from error
    calls, assigned = list[_Call](), dict[str, list[ast.expr]]()
    for node in nodes:
        if isinstance(node, ast.Call):
            arguments = {keyword.arg or "**": keyword.value for keyword in node.keywords}
            calls.append(_Call(ast.unparse(node.func), node, arguments))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.arg | ast.AugAssign | ast.For):
            # It is known only when the code runs.
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            assigned.setdefault(name, []).extend([ast.Name(name), ast.Name(name)])
    calls.sort(key=lambda call: call.node.lineno)

    def literal(node: ast.expr | None, depth: int = 0) -> Any:
        """Return a literal's value, or null; an attribute such as `torch.bfloat16` is its last name."""
        if isinstance(node, ast.Name) and depth < 2 and len(assigned.get(node.id, ())) == 1:
            return literal(assigned[node.id][0], depth + 1)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            return node.attr
        with suppress(ValueError, TypeError, MemoryError, RecursionError):
            return None if node is None else ast.literal_eval(node)
        return None

    def options_of(call: _Call, prefix: str = "") -> Options:
        said = {f"{prefix}{name}": value for name, value in call.arguments.items() if name != "**"}
        options = Options({name: literal(value) for name, value in said.items()})
        options.lines = {name: value.lineno for name, value in said.items()}
        if "**" not in call.arguments:
            defaults = frameworks()["trl"]["defaults"].get(call.name, {})
            options.fill({f"{prefix}{name}": value for name, value in defaults.items()})
        return options

    trainers = [call for call in calls if call.name.endswith("Trainer") and call.arguments]
    settings = [
        call
        for call in calls
        if call.name.endswith("TrainingArguments") or (call.name.endswith("Config") and _task_of(call.name)[0])
        if trainers or "learning_rate" in call.arguments
    ]
    loaders = [call for call in calls if call.name == "from_pretrained" and "Model" in call.function]
    names_of_model = ("pretrained_model_name_or_path", "model_name", "model")
    models = set()
    for call in loaders or trainers:
        named = [call.arguments[name] for name in names_of_model if name in call.arguments]
        models.add(text(literal(next(iter([*named, *call.node.args]), None))))
    makers = ("get_peft_model", "add_adapter")
    loras = [call for call in calls if call.name == "LoraConfig" or (call.name in makers and "r" in call.arguments)]
    given = [value for call in trainers for name, value in call.arguments.items() if name in ("peft_config", "**")]
    # Of a name with several values, and of a condition, it is not known which counts.
    unsure = any(isinstance(value, ast.IfExp) for value in given)
    unsure |= any(len(values) > 1 and call.node in values for call in loras for values in assigned.values())
    peft = any(not (isinstance(value, ast.Constant) and value.value is None) for value in given)
    peft |= "PeftModel" in content or any(call.name in makers for call in calls)
    method: Method | None = "lora" if len(loras) == 1 and not unsure else None
    if not loras and not peft and (loaders or any(models)):
        method = "fullft"
    loaded_in = [bits for call in calls for bits in (4, 8) if literal(call.arguments.get(f"load_in_{bits}bit")) is True]
    if len(settings) > 1:
        method, models, loaded_in = None, set(), []
    keys, lora = frameworks()["trl"]["names"], Options()
    if method == "lora":
        lora = options_of(loras[0], "peft.")
        fields = frameworks()["peft"]["names"].items()
        keys = keys | {field: f"peft.{name}" for field, name in fields if field != "model"}
    runs = []
    for call in settings:
        options = options_of(call)
        if any("optimizers" in call.arguments or call.name == "create_loraplus_optimizer" for call in calls):
            # The learning rate is that of the optimizer, which another function makes.
            options.values |= {"learning_rate": None, "optim": None}
        options.values |= lora.values
        options.lines |= lora.lines
        task = _task_of(call.name, *(trainer.name for trainer in trainers))[0]
        runs.append(
            record(
                path,
                "trl",
                options,
                keys,
                name=f"line {call.node.lineno}",
                task=task,
                method=method,
                model=next(iter(models)) if len(models) == 1 else None,
                bits=next(iter(loaded_in), None),
                unsloth=any("FastLanguageModel" in loader.function for loader in loaders),
                **_plain_fields(options, task),
            )
        )
    return runs
