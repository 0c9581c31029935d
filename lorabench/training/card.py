"""The page `README.md` beside a run's saved weights, as hubs of models read it: what was trained, and how."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lorabench.config.fields import METHOD_NAMES
from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel
from lorabench.store.schemas import ExampleLoss

_SCHEDULES = {"constant": "constant", "linear": "falling linearly to zero"}


def model_card(
    record: dict[str, Any], base: ModelSpec, losses: Sequence[ExampleLoss], groups: Sequence[str] | None
) -> str:
    """Return the page of a finished run.

    Args:
        record: the content of the run's record.json.
        base: the base model.
        losses: the loss of each test example; empty if the run has none.
        groups: the group of each test example; None where examples are independent.
    """
    spec, outcome, environment = record["spec"], record["outcome"], record["environment"]
    lora, method = spec["method"] != "fullft", METHOD_NAMES[spec["method"]]
    name, exact = _base(base)
    head = {
        "base_model": name,
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["lora"] if lora else []), "lorabench"],
    }
    commit = environment["git_sha"] or "not known: installed without its repository"
    if spec["task"] == "rl":
        measure, unit, value = "test accuracy", "", outcome["final_reward"]
    else:
        measure, unit, value = "test loss", " nats per token", outcome["final_test_nll"]
    rows = {
        "base model": exact,
        "task": {"sft": "supervised fine-tuning", "rl": "reinforcement learning"}[spec["task"]],
        "method": method if lora else "full fine-tuning",
        "learning rate": f"{spec['lr']:g}, {_SCHEDULES[spec['protocol']['schedule']]}",
    }
    if lora:
        quantized = spec["method"] == "qlora"
        rows |= {
            "rank": str(spec["rank"]),
            "alpha": f"{spec['alpha']:g}",
            "learning rate of B over that of A": f"{spec['lr_ratio'] or 1:g}",
            "initial scale of A": f"{spec['init_a'] or 1:g}",
            "layers with LoRA": {"all": "all", "attn": "attention", "mlp": "MLP"}[spec["placement"]],
            **({"base weights": "rounded to 4 bits (NF4), but for embedding and unembedding"} if quantized else {}),
            "LoRA on the unembedding": "yes" if spec["protocol"]["include_unembedding"] else "no",
        }
    rows |= {
        "trained parameters": f"{outcome['trainable_params']:,}",
        "steps": f"{spec['steps']:,}",
        "batch size": f"{spec['batch_size']:,} {'responses' if spec['task'] == 'rl' else 'examples'}",
        "seed": str(spec["seed"]),
        "data": f"{spec['dataset']}, SHA-256 of the file {environment['dataset_sha256']}...",
        "precision": spec["protocol"]["precision"],
        measure: "not measured" if value is None else f"{value:.4f}{unit}{_error(losses, groups)}",
        "status": outcome["status"],
        "run": record["run_id"],
        "commit of lorabench": commit + (", with local changes" if environment["git_dirty_patch"] else ""),
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    title = f"{method} adapter" if lora else "Full fine-tuning"
    about = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{about}---\n\n# {title} of {name}\n\n"
        f"| setting | value |\n|---|---|\n{table}\n\nTrained and judged by lorabench.\n"
    )


def _base(spec: ModelSpec) -> tuple[str, str]:
    """Return the name of a base model, and the name with what makes it exact."""
    match spec:
        case HubModel():
            return spec.id, f"{spec.id} at {spec.revision}"
        case PathModel():
            name = Path(spec.path).name
            return name, f"{name}, a local folder"
        case GgufModel():
            return Path(spec.path).name, f"{Path(spec.path).name}, dequantized, SHA-256 {spec.sha256}"
        case _:
            return spec.name, f"{spec.name}, a tiny base of lorabench"


def _error(losses: Sequence[ExampleLoss], groups: Sequence[str] | None) -> str:
    """Return the standard error of the loss per token over examples or their groups, as the end of a sentence."""
    parts: dict[Any, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for number, example in enumerate(losses):
        part = parts[number if groups is None else groups[number]]
        part[0] += example.loss
        part[1] += example.tokens
    if len(parts) < 2:
        return " (without a standard error: losses of single examples were not kept)"
    tokens = sum(part[1] for part in parts.values())
    mean = sum(part[0] for part in parts.values()) / tokens
    squares = sum((loss - mean * count) ** 2 for loss, count in parts.values())
    error = math.sqrt(squares * len(parts) / (len(parts) - 1)) / tokens
    what = "examples" if groups is None else "groups of examples"
    return f" (standard error {error:.4f} over {len(parts):,} {what})"
