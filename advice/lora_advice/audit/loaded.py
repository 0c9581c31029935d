"""A run as transformers' Trainer holds it: the settings that the checks read, of its arguments, model and optimizer.

They are those that count when training starts, whatever the script says: modules with LoRA are those that PEFT made,
and learning rates those of the optimizer. PyTorch is not imported here.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_advice.audit.config import Task, TrainingConfig
from lora_advice.audit.readers import adapter
from lora_advice.audit.readers.options import frameworks
from lora_advice.errors import UserError
from lora_advice.foreign import typed
from lora_advice.models import ModelConfig, ModelFacts, facts_of_config, module_kind

_PRECISIONS = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
_APART = frozenset({"unembedding", "embedding", "router"})
"""The kinds of layers that count for no placement."""


@dataclass(frozen=True)
class LoadedRun:
    """A run that starts; null is what is not known."""

    config: TrainingConfig
    model: ModelFacts | None
    placement: str | None = None  # the layers with LoRA: `all`, `attn` or `mlp`; null if it is on a part of them
    unembedding: bool | None = None  # whether LoRA is on the unembedding
    uniform: bool = True  # whether rank and alpha are the same everywhere
    precision: str = ""  # of the trained weights
    trained: int | None = None  # number of trained parameters


def loaded_run(args: Any, state: Any, model: Any, optimizer: Any, task: Task | None, sharded: str) -> LoadedRun:
    """Return the run of a trainer's arguments, state, model and optimizer, or raise UserError.

    Without a task the class of the arguments says it. `sharded` is DEEPSPEED or FSDP where processes share parameters.
    """
    if not hasattr(model, "config"):
        raise UserError(f"a model of transformers is needed, and this is a {type(model).__name__}")
    task = task or task_of(type(args))
    # Processes that share the work on an example do not add to the batch.
    parallelism = getattr(args, "parallelism_config", None)
    shared = math.prod(getattr(parallelism, f"{kind}_size", 1) for kind in ("tp", "cp", "sp"))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    types = {_PRECISIONS.get(str(weight.dtype), str(weight.dtype)) for weight in weights}
    run = LoadedRun(
        TrainingConfig(
            path=args.output_dir,
            format="trl",
            task=task,
            # Where weights are frozen it is another method.
            method="fullft" if all(weight.requires_grad for weight in model.parameters()) else None,
            model=model.config.name_or_path or None,
            bits=4 if _is_on(model, "is_loaded_in_4bit") else 8 if _is_on(model, "is_loaded_in_8bit") else None,
            schedule=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            optimizer=_optimizer_name(args, optimizer, sharded),
            micro_batch=state.train_batch_size or args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            devices=max(1, args.world_size // shared),
            group_size=getattr(args, "num_generations", None) if task == "rl" else None,
            steps=state.max_steps,
        ),
        _model_facts(model),
        precision=types.pop() if len(types) == 1 else "mixed",
        trained=None if sharded else sum(weight.numel() for weight in weights),
    )
    if adapters := getattr(model, "peft_config", None):
        run = _with_adapter(run, model, adapters)
    lr, ratio = _lrs(model, optimizer, args.learning_rate)
    # DeepSpeed keeps a copy of the weights in fp32.
    rounded = run.config.method == "fullft" and run.precision == "bf16" and sharded != "DEEPSPEED"
    return replace(run, config=replace(run.config, lr=lr, lr_ratio=ratio, rounded=rounded))


def task_of(arguments: type) -> Task | None:
    """Return the task by a class of arguments of transformers or TRL, or by the first of these that it inherits from.

    Those of transformers count as supervised fine-tuning.
    """
    tasks: Mapping[Task, list[str]] = frameworks()["trl"]["tasks"]
    for parent in arguments.__mro__:
        name = parent.__name__.lower().removesuffix("config")
        if parent.__module__.startswith("trl.") and not name.startswith("_"):
            return next((task for task, words in tasks.items() if any(map(name.endswith, words))), None)
    return "sft"


def _is_on(model: Any, name: str) -> bool:
    return bool(getattr(model, name, False))


def _optimizer_name(args: Any, optimizer: Any, sharded: str) -> str:
    """Return the class of the optimizer, or what the arguments ask for where another library wraps it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    asked = str(getattr(args.optim, "value", args.optim))
    return asked if inner is None or sharded == "DEEPSPEED" else type(inner).__name__


def _model_facts(model: Any) -> ModelFacts | None:
    """Return what the configuration of a loaded model says."""
    with suppress(UserError):
        text, name = json.dumps(model.config.to_dict(), default=str), model.config.name_or_path or "the model"
        return facts_of_config(typed(ModelConfig, text, name), name, "the configuration of the loaded model")
    return None


def _with_adapter(run: LoadedRun, model: Any, adapters: Mapping[str, Any]) -> LoadedRun:
    """Return a run with what PEFT's configuration of the adapter says and where the model has LoRA."""
    active = getattr(model, "active_adapter", None)
    name = active if isinstance(active, str) else "default"
    chosen = adapters.get(name) or next(iter(adapters.values()))
    text = json.dumps(chosen.to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    [lora] = adapter.read(Path("the adapter"), text)
    with_lora, without, parameters = set[str](), set[str](), set[str]()
    for path, module in model.named_modules():
        parts = path.split(".")
        own = ".".join(part for part in parts if part != "base_layer")
        if hasattr(module, "lora_A"):
            parameter = getattr(module, "parameter_name", None)
            (parameters if parameter else with_lora).add(f"{own}.{parameter}" if parameter else own)
        elif re.search("Linear|Conv1D", type(module).__name__) and not any("lora_" in part for part in parts):
            without.add(own)
    without -= with_lora
    kinds, others = ({module_kind(path) for path in paths} for paths in (with_lora | parameters, without))
    if run.model is not None and run.model.mixture and "experts" not in kinds:
        others.add("experts")
    # Experts count as the MLP.
    layers, missed = ({"mlp" if kind == "experts" else kind for kind in paths - _APART} for paths in (kinds, others))
    placements = {"all": {"attention", "mlp"}, "attn": {"attention"}, "mlp": {"mlp"}}
    placement = next((name for name, whole in placements.items() if layers == whole and not whole & missed), None)
    ends = {path.rpartition(".")[2] for path in with_lora}
    if placement == "all" and not (run.model and run.model.mixture):
        ends = {"all-linear", *(end for end in ends if module_kind(end) in _APART)}
    config = replace(
        lora,
        **{name: getattr(run.config, name) for name in _OF_TRAINER},
        model=lora.model or run.config.model,
        lines={},
        targets=tuple(sorted(ends)) or None,
        target_parameters=tuple(sorted({".".join(path.split(".")[-2:]) for path in parameters})),
        findings=tuple(replace(finding, line=None) for finding in lora.findings),
    )
    uniform = not (chosen.rank_pattern or chosen.alpha_pattern)
    return replace(run, config=config, placement=placement, unembedding="unembedding" in kinds, uniform=uniform)


_OF_TRAINER = (
    *("path", "format", "task", "bits", "schedule", "optimizer"),
    *("micro_batch", "accumulation", "devices", "group_size", "steps"),
)
"""The fields of a run that its trainer says, also of one with LoRA."""


def _lrs(model: Any, optimizer: Any, stated: float) -> tuple[float | None, float | None]:
    """Return the learning rate, in LoRA that of A, and the ratio of B's to it if they differ; None of several others.

    The stated one counts where the optimizer holds other tensors than the model, as sharded ones.
    """
    names = {id(weight): name for name, weight in model.named_parameters()}
    rates = defaultdict[bool, set[float]](set)
    for group in getattr(optimizer, "param_groups", ()):
        for weight in group["params"]:
            if id(weight) in names:
                rates[".lora_B." in names[id(weight)]].add(float(group.get("initial_lr", group["lr"])))
    if any(len(own) > 1 for own in rates.values()):
        return None, None
    first, *others = [rate for is_b in (False, True) for rate in rates.get(is_b, ())] or [stated]
    return first, others[0] / first if others and first and others[0] != first else None
