"""Calls of TRL's, transformers' and PEFT's classes in Python code, by the syntax tree; nothing is executed.

Literals count, and names that are assigned a literal once in the file. What is computed is not said. A file has one
model and one LoRA, or these are not known.
"""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import Options, frameworks, record
from lora_advice.audit.readers.values import number, text
from lora_advice.errors import UserError

_SETTINGS = re.compile(r"\w+Config|\w*TrainingArguments")
_TASKS: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("rl", ("grpo", "rloo", "ppo", "gspo", "gmpo", "xpo", "nash", "nashmd", "online", "onlinedpo")),
    ("preference", ("dpo", "kto", "cpo", "orpo", "bco", "tpo", "mpo", "reward", "prm")),
    ("sft", ("sft",)),
)


def task_of(*names: str) -> tuple[Task | None, str]:
    """Return the task by the words of programs, classes or folders, and the word that says it."""
    for name in names:
        class_name = re.sub(r"(Config|Trainer)$", "", name)
        words = re.split(r"[^a-z]+", class_name.lower())
        for task, known in _TASKS:
            for word in known:
                if word in words or (class_name != name and words[-1].endswith(word)):
                    return task, word
    return None, ""


def plain_fields(options: Options, task: Task | None) -> dict[str, Any]:
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


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return a run for each call of a class of settings, or of a trainer where there is none.

    Raises:
        UserError: it is not valid Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = [*ast.walk(ast.parse(content))]
    except (SyntaxError, ValueError, MemoryError) as error:  # of what is nested deeply, the parser says the last
        raise UserError(f"it is not valid Python: {str(error) or 'it is nested too deeply'}") from error
    assigned: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.arg | ast.AugAssign | ast.For):
            # It is known only when the code runs.
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            assigned.setdefault(name, []).extend([ast.Tuple(), ast.Tuple()])
    loaded = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}

    def literal(node: ast.expr | None, depth: int = 0) -> Any:
        """Return a literal's value, or null; an attribute such as `torch.bfloat16` is its last name."""
        if isinstance(node, ast.Name) and depth < 2 and len(assigned.get(node.id, ())) == 1:
            return literal(assigned[node.id][0], depth + 1)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            return node.attr
        try:
            return None if node is None else ast.literal_eval(node)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return None

    def options_of(call: ast.Call, default: str) -> Options:
        said = [keyword for keyword in call.keywords if keyword.arg]
        options = Options(
            {str(keyword.arg): literal(keyword.value) for keyword in said},
            {str(keyword.arg): keyword.value.lineno for keyword in said},
        )
        if len(said) == len(call.keywords) and not (call.args and call in settings):
            options.fill(defaults.get(default, {}))
        return options

    calls = sorted((node for node in nodes if isinstance(node, ast.Call)), key=lambda call: call.lineno)
    defaults = frameworks()["trl"]["defaults"]
    trainers = [call for call in calls if _name(call).endswith("Trainer") and call.keywords]
    task_names = [_name(call) for call in trainers]
    settings = [
        call
        for call in calls
        if _SETTINGS.fullmatch(_name(call))
        and (task_of(_name(call))[0] or "TrainingArguments" in _name(call))
        and (trainers or any(keyword.arg == "learning_rate" for keyword in call.keywords))
    ]
    findings, loras = [], list[ast.Call]()
    for call in calls:
        if _name(call) == "LoraConfig" or (
            _name(call) in ("get_peft_model", "add_adapter") and any(keyword.arg == "r" for keyword in call.keywords)
        ):
            held = [name for name, values in assigned.items() if call in values]
            if held and not loaded & {*held}:
                findings.append(say("unused-lora", call.lineno, name=held[0]))
            else:
                # Of a name with several values it is not known which counts.
                loras += [call] if not held or len(assigned[held[0]]) == 1 else [call, call]
    loaders = [call for call in calls if _name(call) == "from_pretrained" and "Model" in ast.unparse(call.func)]
    made = [value for call in loaders for value in (_argument(call, "pretrained_model_name_or_path", "model_name"),)]
    if not loaders:
        made = [_argument(call, "model") for call in trainers]
    models = {literal(value) for value in made if isinstance(literal(value), str | None)}
    method: Method | None = "lora" if len(loras) == 1 else None
    given = [keyword.value for call in trainers for keyword in call.keywords if keyword.arg in ("peft_config", None)]
    peft = [value for value in given if not (isinstance(value, ast.Constant) and value.value is None)]
    made_by = {"get_peft_model", "add_adapter", "PeftModel", "AutoPeftModelForCausalLM"}
    if not loras and not peft and not made_by & {*loaded, *map(_name, calls)} and (loaders or any(models)):
        method = "fullft"
    said = [(name, keyword) for call in calls for keyword in call.keywords if (name := keyword.arg or "")]
    bits = (int(name[8]) for name, keyword in said if re.fullmatch("load_in_[48]bit", name) and literal(keyword.value))
    bits_of_base = next(bits, None)
    if len(settings) > 1:
        method, models, bits_of_base = None, set(), None
    # The learning rate is then that of the optimizer, which another function makes.
    own_optimizer = any(name == "optimizers" for name, _ in said) or "create_loraplus_optimizer" in map(_name, calls)
    keys, runs = frameworks()["trl"]["names"], []
    if method == "lora":
        lora = options_of(loras[0], _name(loras[0]))
        peft = frameworks()["peft"]["names"]
        keys = keys | {field: f"peft.{name}" for field, name in peft.items() if field != "model"}
    for call in settings or trainers[:1]:
        default = re.sub("Trainer$", "Config", _name(call))
        complete = _argument(call, "model") is not None and not any(name == "args" for name, _ in said)
        if call not in settings and not (complete and default in defaults):
            continue
        options = options_of(call, default) if call in settings else Options(dict(defaults[default]))
        if own_optimizer:
            options.values |= {"learning_rate": None, "optim": None}
        if method == "lora":
            options.values |= {f"peft.{name}": value for name, value in lora.values.items()}
            options.lines |= {f"peft.{name}": line for name, line in lora.lines.items()}
        task = task_of(_name(call))[0] or task_of(*task_names)[0]
        runs.append(
            record(
                path,
                "trl",
                options,
                keys,
                findings,
                name=f"line {call.lineno}",
                task=task,
                method=method,
                model=next(iter(models)) if len(models) == 1 else None,
                bits=bits_of_base,
                unsloth=any("FastLanguageModel" in ast.unparse(loader.func) for loader in loaders),
                **plain_fields(options, task),
            )
        )
    return runs


def _name(call: ast.Call) -> str:
    """Return the last name of what is called."""
    return ast.unparse(call.func).rpartition(".")[2]


def _argument(call: ast.Call, *names: str) -> ast.expr | None:
    """Return an argument by its name, or the first one."""
    first = call.args[0] if call.args else None
    return next((keyword.value for keyword in call.keywords if keyword.arg in names), first)
