"""The page `README.md` beside a run's saved weights, as hubs of models read it: what was trained, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lorabench.config.fields import METHOD_NAMES
from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, TinyModel


def model_card(record: dict[str, Any], base: ModelSpec) -> str:
    """Return the page of a finished run, given the content of its record.json and its base model."""
    spec, outcome, environment = record["spec"], record["outcome"], record["environment"]
    is_lora, is_rl, method = spec["method"] != "fullft", spec["task"] == "rl", METHOD_NAMES[spec["method"]]
    match base:
        case HubModel():
            name, source = base.id, f" at {base.revision}"
        case TinyModel():
            name, source = base.name, ", a tiny base of lorabench"
        case _:
            name = Path(base.path).name
            source = f", dequantized, SHA-256 {base.sha256}" if isinstance(base, GgufModel) else ", a local folder"
    head = {
        "base_model": name,
        "library_name": "peft" if is_lora else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorabench"] if is_lora else ["lorabench"],
    }
    rows = {
        "base model": name + source,
        "task": "reinforcement learning" if is_rl else "supervised fine-tuning",
        "method": method if is_lora else "full fine-tuning",
        "learning rate": f"{spec['lr']:g}, "
        + {"constant": "constant", "linear": "falling linearly to zero"}[spec["protocol"]["schedule"]],
    }
    if is_lora:
        rows |= {
            "rank": str(spec["rank"]),
            "alpha": f"{spec['alpha']:g}",
            "learning rate of B over that of A": f"{spec['lr_ratio'] or 1:g}",
            "initial scale of A": f"{spec['init_a'] or 1:g}",
            "layers with LoRA": {"all": "all", "attn": "attention", "mlp": "MLP"}[spec["placement"]],
        }
        if spec["method"] == "qlora":
            rows["base weights"] = "rounded to 4 bits (NF4), but for embedding and unembedding"
        rows["LoRA on the unembedding"] = "yes" if spec["protocol"]["include_unembedding"] else "no"
    value = outcome["final_reward" if is_rl else "final_test_nll"]
    measured = "not measured" if value is None else f"{value:.4f}" if is_rl else f"{value:.4f} nats per token"
    commit = environment["git_sha"] or "not known: installed without its repository"
    rows |= {
        "trained parameters": f"{outcome['trainable_params']:,}",
        "steps": f"{spec['steps']:,}",
        "batch size": f"{spec['batch_size']:,} {'responses' if is_rl else 'examples'}",
        "seed": str(spec["seed"]),
        "data": f"{spec['dataset']}, SHA-256 of the file {environment['dataset_sha256']}...",
        "precision": spec["protocol"]["precision"],
        "test accuracy" if is_rl else "test loss": measured,
        "status": outcome["status"],
        "run": record["run_id"],
        "commit of lorabench": commit + (", with local changes" if environment["git_dirty_patch"] else ""),
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    title = f"{method} adapter" if is_lora else "Full fine-tuning"
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {title} of {name}\n\n"
        f"| setting | value |\n|---|---|\n{table}\n\nTrained and judged by lorabench.\n"
    )
