"""Calls of TRL's, transformers' and PEFT's classes in Python code, by the syntax tree; nothing is executed.

Literals count, and names that are assigned a literal once in the file. What is computed is not said.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

from lora_advice.audit.config import Method, Task, TrainingConfig, say
from lora_advice.audit.readers.options import Options, defaults, names_of, record
from lora_advice.errors import UserError
from lora_advice.finding import Finding

CALL = re.compile(
    r"\b(\w*(?:SFT|GRPO|RLOO|DPO|KTO|CPO|ORPO|BCO|TPO|PPO|XPO|PRM|NashMD|Reward)(?:Config|Trainer)"
    r"|\w*TrainingArguments)\("
)
"""A call of a class of settings or of a trainer of TRL, in a text; for a quick look."""

_CLASS = re.compile(CALL.pattern.removesuffix(r"\("))
_NEW_LORA = ("get_peft_model", "add_adapter")
_NOT_SAID = object()
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
    steps = options.number("max_steps")
    # Steps count before epochs, also those of a variable that is not known.
    epochs_count = "max_steps" not in options or (steps is not None and steps <= 0)
    return {
        "group_size": options.count("num_generations") if task == "rl" else None,
        "steps": steps if steps is not None and steps > 0 else None,
        "epochs": options.number("num_train_epochs") if epochs_count else None,
        "rounded": options.text("dtype torch_dtype") == "bfloat16",
    }


def parse(text: str) -> ast.Module:
    """Return the syntax tree of Python code, without the warnings that Python prints about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError) as error:  # of what is nested deeply, the parser says the last
        raise UserError(f"it is not valid Python: {str(error) or 'it is nested too deeply'}") from error


class _Module:
    def __init__(self, tree: ast.Module, lines: Sequence[int]) -> None:
        self.lines = lines
        """For each line of the code, the line of the file."""
        self.calls = list[ast.Call]()
        self.assigned: dict[str, list[ast.expr]] = defaultdict(list)
        """What is assigned to a name, anywhere in the file."""
        self.loaded = set[str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                self.calls.append(node)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self.loaded.add(node.id)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    targets, values = [target], [node.value]
                    if isinstance(target, ast.Tuple):
                        targets = target.elts
                        values = node.value.elts if isinstance(node.value, ast.Tuple) else values
                    for name, value in zip(targets, values, strict=False):
                        if isinstance(name, ast.Name):
                            self.assigned[name.id].append(value)
            elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and isinstance(node.target, ast.Name) and node.value:
                self.assigned[node.target.id].append(node.value)
            elif isinstance(node, (ast.AugAssign, ast.For)) and isinstance(node.target, ast.Name):
                self.assigned[node.target.id] += [node.target, node.target]  # known only when the code runs
            elif isinstance(node, ast.arg):
                self.assigned[node.arg] += [ast.Name(node.arg), ast.Name(node.arg)]

    def resolve(self, node: ast.expr | None) -> list[ast.expr]:
        """Return what an expression may be: itself, or all that is assigned to the name that it is."""
        if isinstance(node, ast.Name):
            return self.assigned.get(node.id, [])
        return [] if node is None else [node]

    def literal(self, node: ast.expr | None) -> Any:
        """Return a literal's value, or `_NOT_SAID`; an attribute such as `torch.bfloat16` is its last name."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            values = self.assigned.get(node.id, [])
            return self.literal(values[0]) if len(values) == 1 and not isinstance(values[0], ast.Name) else _NOT_SAID
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.literal(node.operand)
            return -value if isinstance(value, (int, float)) else _NOT_SAID
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            values = [self.literal(element) for element in node.elts]
            return _NOT_SAID if _NOT_SAID in values else values
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return node.attr
        return _NOT_SAID

    def options(self, call: ast.Call) -> Options:
        """Return the keyword arguments of a call."""
        options = Options()
        for keyword in call.keywords:
            if keyword.arg is not None:
                value = self.literal(keyword.value)
                options.set(keyword.arg, None if value is _NOT_SAID else value, self.lines[keyword.value.lineno - 1])
        return options


def read(shown: str, tree: ast.Module, lines: Sequence[int]) -> list[TrainingConfig]:
    """Return a run for each call of a class of settings that a trainer gets or that says a learning rate.

    Args:
        shown: the file, for people.
        tree: its code.
        lines: for each line of the code, the line of the file.
    """
    module = _Module(tree, lines)
    settings = [call for call in module.calls if _CLASS.fullmatch(_name(call)) and not _name(call).endswith("Trainer")]
    trainers = [call for call in module.calls if _name(call).endswith("Trainer") and call.keywords]
    runs: list[tuple[ast.Call, ast.Call | None, Options]] = []
    for call in settings:
        options = module.options(call)
        trainer = next((made for made in trainers if call in module.resolve(_argument(made, "args", 1))), None)
        if trainer is not None or "learning_rate" in options:
            runs.append((call, trainer, options))
    for trainer in trainers:  # without settings, all are defaults
        of_trl = re.sub(r"Trainer$", "Config", _name(trainer)) in defaults()
        complete = all(keyword.arg for keyword in trainer.keywords) and _argument(trainer, "model", 0) is not None
        if of_trl and complete and _argument(trainer, "args", 1) is None:
            runs.append((trainer, trainer, Options()))
    runs.sort(key=lambda run: run[0].lineno)
    return [_config(shown, module, *run) for run in runs]


def _name(call: ast.AST) -> str:
    """Return the last name of what is called; an empty text of what is no call."""
    function = call.func if isinstance(call, ast.Call) else None
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _argument(call: ast.Call, name: str, position: int = 99) -> ast.expr | None:
    keyword = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return call.args[position] if keyword is None and len(call.args) > position else keyword


def _config(shown: str, module: _Module, call: ast.Call, trainer: ast.Call | None, options: Options) -> TrainingConfig:
    task, _ = task_of(*[_name(made) for made in (trainer, call) if made is not None])
    if all(keyword.arg for keyword in call.keywords) and (call is trainer or not call.args):
        options.fill(defaults().get(re.sub(r"(?<=.)Trainer$", "Config", _name(call)), {}))
    model, bits, unsloth, method, findings = None, None, False, None, list[Finding]()
    keys = names_of("trl")
    if trainer is not None:
        model, bits, unsloth = _model(module, trainer)
        method, lora = _lora(module, trainer)
        if lora is not None:
            settings = module.options(lora)
            if _name(lora) == "LoraConfig" and not lora.args and all(keyword.arg for keyword in lora.keywords):
                settings.fill(defaults()["LoraConfig"])
            for name, value in settings.values.items():
                options.set(f"peft.{name}", value, settings.lines.get(name))
            keys = keys | {field: f"peft.{name}" for field, name in names_of("peft").items() if field != "model"}
        unused = [(name, values) for name, values in module.assigned.items() if name not in module.loaded]
        for name, value in ((name, value) for name, values in unused for value in values):
            if _name(value) == "LoraConfig":
                line = module.lines[value.lineno - 1]
                findings.append(say("unused-lora", line, name=name, trainer=_name(trainer)))
    own = trainer is not None and _argument(trainer, "optimizers") is not None
    if own or any(_name(made) == "create_loraplus_optimizer" for made in module.calls):
        # The learning rate is that of the optimizer, which another function makes.
        options.values |= {"learning_rate": None, "optim": None}
    return record(
        shown,
        "trl",
        options,
        keys,
        findings,
        name=f"line {module.lines[call.lineno - 1]}",
        task=task,
        method=method,
        model=model,
        bits=bits,
        unsloth=unsloth,
        **plain_fields(options, task),
    )


def _model(module: _Module, trainer: ast.Call) -> tuple[str | None, int | None, bool]:
    """Return the id of a trainer's base model, the bits that it is loaded with, and whether unsloth loads it."""
    node = _argument(trainer, "model", 0)
    name, unsloth = module.literal(node), False
    loaders: list[ast.expr] = [call for call in module.calls if _name(call) == "BitsAndBytesConfig"]
    if not isinstance(name, str):
        loader = next((value for value in module.resolve(node) if _name(value) == "from_pretrained"), None)
        if not isinstance(loader, ast.Call):
            return None, None, False
        name = module.literal(
            _argument(loader, "pretrained_model_name_or_path", 0) or _argument(loader, "model_name", 0)
        )
        loaders = [loader, *module.resolve(_argument(loader, "quantization_config"))]
        unsloth = isinstance(loader.func, ast.Attribute) and ast.unparse(loader.func.value).startswith("Fast")
    said = [(made, text) for made in loaders if isinstance(made, ast.Call) for text in ("load_in_4bit", "load_in_8bit")]
    on = (int(text[8]) for made, text in said if module.literal(_argument(made, text)) is True)
    return name if isinstance(name, str) else None, next(on, None), unsloth


def _lora(module: _Module, trainer: ast.Call) -> tuple[Method | None, ast.Call | None]:
    """Return the method of a trainer's run, and the call that sets LoRA's options."""
    given = _argument(trainer, "peft_config")
    if given is not None and not (isinstance(given, ast.Constant) and given.value is None):
        values = module.resolve(given)
        if len(values) == 1 and _name(values[0]) == "LoraConfig":
            return "lora", cast("ast.Call", values[0])
        if len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is None:
            return "fullft", None
        return None, None
    made = [call for call in module.calls if _name(call) in _NEW_LORA]
    for call in made:
        arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
        values = [value for argument in arguments for value in module.resolve(argument)]
        configs = [value for value in values if _name(value) == "LoraConfig"]
        if len(configs) == 1:
            return "lora", cast("ast.Call", configs[0])
        if any(keyword.arg == "r" for keyword in call.keywords):
            return "lora", call
    model = _argument(trainer, "model", 0)
    loaded = any(_name(value) == "from_pretrained" for value in module.resolve(model))
    unpacked = any(keyword.arg is None for keyword in trainer.keywords)
    peft = bool(made) or not module.loaded.isdisjoint(("PeftModel", "AutoPeftModelForCausalLM"))
    known = loaded or isinstance(module.literal(model), str)
    return ("fullft" if known and not unpacked and not peft else None), None
