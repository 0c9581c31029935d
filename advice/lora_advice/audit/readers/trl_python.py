"""Calls of TRL's, transformers' and PEFT's classes in Python code, by the syntax tree; nothing is executed.

Literals count, and names that are assigned a literal once in the file. What is computed is not said.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from lora_advice.audit.config import Method, TrainingConfig
from lora_advice.audit.readers.options import THE_FILE, Options, defaults, names_of, record
from lora_advice.audit.readers.trl_options import plain_fields, task_of
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


@dataclass
class _Module:
    calls: list[ast.Call]
    assigned: dict[str, list[ast.expr]]
    """What is assigned to a name, anywhere in the file."""
    loaded: set[str]
    lines: Sequence[int]
    """For each line of the code, the line of the file."""

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
        """Return the keyword arguments of a call; `**name` counts where the name is a dictionary of literals."""
        options = Options()
        for keyword in call.keywords:
            if keyword.arg is not None:
                value = self.literal(keyword.value)
                options.set(keyword.arg, None if value is _NOT_SAID else value, self.lines[keyword.value.lineno - 1])
                continue
            for node in self.resolve(keyword.value):
                pairs: list[tuple[str | None, ast.expr]] = []
                if isinstance(node, ast.Dict):
                    pairs = [
                        (key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None, value)
                        for key, value in zip(node.keys, node.values, strict=True)
                    ]
                elif isinstance(node, ast.Call) and _name(node) == "dict":
                    pairs = [(item.arg, item.value) for item in node.keywords]
                for key, item in pairs:
                    if key is not None:
                        value = self.literal(item)
                        twice = key in options and options.values[key] != value
                        options.set(key, None if value is _NOT_SAID or twice else value, self.lines[item.lineno - 1])
        return options


def strings(text: str) -> list[tuple[str, int]]:
    """Return the strings that stand as statements in a file, such as its docstring, and their first lines."""
    lines = text.splitlines()
    return [
        ("\n".join(lines[node.lineno - 1 : node.end_lineno]), node.lineno)
        for node in parse(text).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def read(shown: str, code: str, lines: Sequence[int]) -> list[TrainingConfig]:
    """Return a run for each call of a class of settings that a trainer gets or that says a learning rate.

    Args:
        shown: the file, for people.
        code: Python.
        lines: for each line of the code, the line of the file.
    """
    module = _read_module(parse(code), lines)
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


def parse(text: str) -> ast.Module:
    """Return the syntax tree of Python code, without the warnings that Python prints about it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError) as error:  # of what is nested deeply, the parser says the last
        raise UserError(f"it is not valid Python: {str(error) or 'it is nested too deeply'}") from error


def _read_module(tree: ast.Module, lines: Sequence[int]) -> _Module:
    calls, assigned, loaded = [], defaultdict(list), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls.append(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            loaded.add(node.id)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    assigned[target.id].append(node.value)
                elif isinstance(target, ast.Tuple):
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
                    for name, value in zip(target.elts, values, strict=False):
                        if isinstance(name, ast.Name):
                            assigned[name.id].append(value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and isinstance(node.target, ast.Name) and node.value:
            assigned[node.target.id].append(node.value)
        elif isinstance(node, (ast.AugAssign, ast.For)) and isinstance(node.target, ast.Name):
            assigned[node.target.id] += [node.target, node.target]  # known only when the code runs
        elif isinstance(node, ast.arg):
            assigned[node.arg] += [ast.Name(node.arg), ast.Name(node.arg)]
    return _Module(calls, dict(assigned), loaded, lines)


def _name(call: ast.Call) -> str:
    """Return the last name of what is called."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _argument(call: ast.Call, name: str, position: int) -> ast.expr | None:
    keyword = _keyword(call, name)
    if keyword is None and len(call.args) > position:
        return call.args[position]
    return keyword


def _config(shown: str, module: _Module, call: ast.Call, trainer: ast.Call | None, options: Options) -> TrainingConfig:
    task, _ = task_of(*[_name(made) for made in (trainer, call) if made is not None])
    if all(keyword.arg for keyword in call.keywords) and (call is trainer or not call.args):
        options.fill(defaults().get(re.sub(r"(?<=.)Trainer$", "Config", _name(call)), {}))
    model, bits, unsloth = _model(module, trainer)
    method, lora = _lora(module, trainer)
    keys = dict(names_of("trl"))
    if lora is not None:
        settings = module.options(lora)
        if _is_lora(lora) and not lora.args and all(keyword.arg for keyword in lora.keywords):
            settings.fill(defaults()["LoraConfig"])
        options.update(settings.below("peft"))
        keys |= {field: f"peft.{name}" for field, name in names_of("peft").items()}
    if (optimizer := _loraplus(module, trainer)) is not None:
        options.update(module.options(optimizer).below("plus"))
        keys |= {"lr": "plus.lr", "lr_ratio": "plus.loraplus_lr_ratio"}
    return record(
        shown,
        "trl",
        options,
        keys,
        _unused_lora(module, trainer),
        name=f"line {module.lines[call.lineno - 1]}",
        task=task,
        method=method,
        model=model,
        bits=bits,
        unsloth=unsloth,
        **plain_fields(options, task),
    )


def _loraplus(module: _Module, trainer: ast.Call | None) -> ast.Call | None:
    """Return the call that makes a trainer's LoRA+ optimizer: the last one where no trainer of the file says which."""
    made = [call for call in module.calls if _name(call) == "create_loraplus_optimizer"]
    given = None if trainer is None else _keyword(trainer, "optimizers")
    if given is None:
        said = any(_keyword(call, "optimizers") is not None for call in module.calls)
        return made[-1] if made and not said else None
    pairs = module.resolve(given)
    first = [pair.elts[0] if isinstance(pair, ast.Tuple | ast.List) and pair.elts else pair for pair in pairs]
    values = [value for node in first for value in module.resolve(node)]
    return next((call for call in made if call in values), None)


def _model(module: _Module, trainer: ast.Call | None) -> tuple[str | None, int | None, bool]:
    """Return the id of a trainer's base model, the bits that it is loaded with, and whether unsloth loads it."""
    node = _argument(trainer, "model", 0) if trainer is not None else None
    literal = module.literal(node)
    if isinstance(literal, str):
        return literal, _bits(module, [call for call in module.calls if _name(call) == "BitsAndBytesConfig"]), False
    for value in module.resolve(node):
        if isinstance(value, ast.Call) and _name(value) == "from_pretrained":
            name = module.literal(
                _argument(value, "pretrained_model_name_or_path", 0) or _argument(value, "model_name", 0)
            )
            quantization = module.resolve(_argument(value, "quantization_config", 99))
            unsloth = isinstance(value.func, ast.Attribute) and ast.unparse(value.func.value).startswith("Fast")
            return (name if isinstance(name, str) else None), _bits(module, [value, *quantization]), unsloth
    return None, None, False


def _bits(module: _Module, nodes: list[Any]) -> int | None:
    for node in nodes:
        if isinstance(node, ast.Call):
            for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
                if module.literal(_argument(node, name, 99)) is True:
                    return bits
    return None


def _lora(module: _Module, trainer: ast.Call | None) -> tuple[Method | None, ast.Call | None]:
    """Return the method of a trainer's run, and the call that sets LoRA's options."""
    if trainer is None:
        return None, None
    given = _argument(trainer, "peft_config", 99)
    made = [call for call in module.calls if _name(call) in _NEW_LORA]
    if given is None or (isinstance(given, ast.Constant) and given.value is None):
        for call in made:
            given_to_call = [*call.args, *(keyword.value for keyword in call.keywords)]
            configs = [value for argument in given_to_call for value in module.resolve(argument) if _is_lora(value)]
            if len(configs) == 1:
                return "lora", cast("ast.Call", configs[0])
            if any(keyword.arg == "r" for keyword in call.keywords):
                return "lora", call
        known = isinstance(module.literal(_argument(trainer, "model", 0)), str) or any(
            isinstance(value, ast.Call) and _name(value) == "from_pretrained"
            for value in module.resolve(_argument(trainer, "model", 0))
        )
        unpacked = any(keyword.arg is None for keyword in trainer.keywords)
        peft = bool(made) or any(name in module.loaded for name in ("PeftModel", "AutoPeftModelForCausalLM"))
        return ("fullft" if known and not unpacked and not peft else None), None
    values = module.resolve(given)
    if len(values) == 1 and _is_lora(values[0]):
        return "lora", cast("ast.Call", values[0])
    if len(values) == 1 and isinstance(values[0], ast.Constant) and values[0].value is None:
        return "fullft", None
    return None, None


def _is_lora(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _name(node) == "LoraConfig"


def _unused_lora(module: _Module, trainer: ast.Call | None) -> list[Finding]:
    """Find a LoraConfig that no line uses, in a file that makes a trainer."""
    if trainer is None:
        return []
    unused = [(name, values) for name, values in module.assigned.items() if name not in module.loaded]
    findings = []
    for name, value in ((name, value) for name, values in unused for value in values if _is_lora(value)):
        made = _name(trainer)
        message = (
            f"The LoraConfig {name} is not used: {made} does not get it as peft_config, and no get_peft_model does"
        )
        sure, line = "certain, unless another file imports it", module.lines[value.lineno - 1]
        findings.append(Finding("no-effect", "error", message, THE_FILE, sure, line=line))
    return findings
