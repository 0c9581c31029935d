"""The page `README.md` beside a run's saved weights, as hubs of models read it: what was trained, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorabench.config.fields import METHOD_NAMES
from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel


def model_card(record: dict[str, Any], base: ModelSpec) -> str:
    """Return the page of a finished run, given the content of its record.json and its base model."""
    spec, outcome, environment = record["spec"], record["outcome"], record["environment"]
    lora, method = spec["method"] != "fullft", METHOD_NAMES[spec["method"]]
    match base:
        case HubModel():
            name, exact = base.id, f"{base.id} at {base.revision}"
        case PathModel():
            name = Path(base.path).name
            exact = f"{name}, a local folder"
        case GgufModel():
            name = Path(base.path).name
            exact = f"{name}, dequantized, SHA-256 {base.sha256}"
        case _:
            name, exact = base.name, f"{base.name}, a tiny base of lorabench"
    head = {
        "base_model": name,
        "library_name": "peft" if lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["lora"] if lora else []), "lorabench"],
    }
    commit = environment["git_sha"] or "not known: installed without its repository"
    schedule = {"constant": "constant", "linear": "falling linearly to zero"}[spec["protocol"]["schedule"]]
    rows = {
        "base model": exact,
        "task": {"sft": "supervised fine-tuning", "rl": "reinforcement learning"}[spec["task"]],
        "method": method if lora else "full fine-tuning",
        "learning rate": f"{spec['lr']:g}, {schedule}",
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
    if spec["task"] == "rl":
        measure, unit, value = "test accuracy", "", outcome["final_reward"]
    else:
        measure, unit, value = "test loss", " nats per token", outcome["final_test_nll"]
    rows |= {
        "trained parameters": f"{outcome['trainable_params']:,}",
        "steps": f"{spec['steps']:,}",
        "batch size": f"{spec['batch_size']:,} {'responses' if spec['task'] == 'rl' else 'examples'}",
        "seed": str(spec["seed"]),
        "data": f"{spec['dataset']}, SHA-256 of the file {environment['dataset_sha256']}...",
        "precision": spec["protocol"]["precision"],
        measure: "not measured" if value is None else f"{value:.4f}{unit}",
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
