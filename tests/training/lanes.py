"""Helpers for tests of lanes: tiny bases of several families, runs that share a base, and a plain loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GemmaConfig, MistralConfig, Qwen2Config

from lorabench.config.experiments import Protocol
from lorabench.config.models import TinyModel
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.attention import attend_in_blocks
from lorabench.models.base import load_model
from lorabench.models.lanes.full import stack_full
from lorabench.models.lanes.lora import stack_lora
from lorabench.models.lanes.shelf import Stack, single_lane
from lorabench.models.lora import add_adapter, add_lora
from lorabench.models.tiny import RECIPES
from lorabench.runs import Run
from lorabench.training.batches import data_order
from lorabench.training.drive import train_lanes
from lorabench.training.lane_checkpoints import LaneCheckpoints
from lorabench.training.loss import mean_nll
from lorabench.training.run import Machine
from lorabench.training.sft import SftOutcome, train_sft
from lorabench.training.sft.serve import SftServer

from .conftest import condition_of

CPU = torch.device("cpu")
STEPS, BATCH = 50, 2

# Families without a shipped base, with random weights: grouped heads, biases, tied and scaled embeddings.
FAMILIES: dict[str, Any] = {
    "mistral": partial(MistralConfig, sliding_window=24),
    "qwen2": Qwen2Config,
    "gemma": partial(GemmaConfig, tie_word_embeddings=True),
}
DENSE = ("llama-128", "qwen-64", *FAMILIES)


def base_of(name: str) -> Any:
    """Return a new tiny base, a shipped one or one of `FAMILIES`."""
    if name in RECIPES:
        return load_model(TinyModel(kind="tiny", name=name))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    # Without a padding token, since Gemma would keep its embedding at zero.
    tokens = {"vocab_size": 1024, "pad_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](**sizes, **heads, **tokens))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    attend_in_blocks(model)
    return model.train()


def run_of(
    method: str, lr: float, seed: int, steps: int = STEPS, batch_size: int = BATCH, rank: int = 4, **changes
) -> Run:
    """Return a run; further keyword arguments change its condition."""
    condition = condition_of(method, rank if method == "lora" else None, steps, batch_size)
    return Run(replace(condition, **changes), lr, seed)


def stack_of(model: Any, runs: Sequence[Run], protocol: Protocol | None = None) -> Stack:
    """Return the stack with a lane for each of some runs of one condition."""
    condition, names = runs[0].condition, [run.run_id for run in runs]
    if condition.method == "fullft":
        return stack_full(model, names) if len(names) > 1 else single_lane(model, *names)
    head, init_a = (protocol or Protocol()).include_unembedding, condition.init_a or 1.0
    first, *others = runs
    model = add_lora(model, condition.rank, "all", condition.alpha, head, first.seed, init_a, first.run_id)
    for run in others:
        add_adapter(model, run.run_id, run.seed, init_a)
    return stack_lora(model, names)


def train_together(
    runs: Sequence[Run],
    model: Any,
    data: Mapping[Any, TokenizedSplit],
    folder: Path,
    protocol: Protocol | None = None,
    checkpoint_seconds: float = 1e9,
    tick=lambda run, step: None,
    ended=lambda stack, run: None,
    **machine: Any,
) -> dict[str, SftOutcome]:
    """Train some runs of one condition as a job does and return their outcomes by run_id.

    Args:
        tick: called with the run's number and the step.
        ended: called with the stack and the run when a run has ended, before its lane is dropped.
    """
    protocol = protocol or Protocol()
    where = Machine(**{"device": CPU, "max_batch_tokens": 16_384, "checkpoint_seconds": checkpoint_seconds} | machine)
    autocast = where.autocast(protocol)
    base_nll = mean_nll(model, data["validation"], where.max_batch_tokens, CPU, autocast, packing=where.packing)
    stack = stack_of(model, runs, protocol)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {run.run_id: folder / f"{run.run_id}.safetensors" for run in runs}
    checkpoints = LaneCheckpoints(paths, checkpoint_seconds)

    def lane_of(number: int, run: Run):
        lane, vocabulary = stack.lanes[run.run_id], model.config.vocab_size
        ticked = lambda step: tick(number, step)  # noqa: E731
        return train_sft(run, lane, vocabulary, data, protocol, where.processes, checkpoints, base_nll, ticked)

    outcomes, by_id = {}, {run.run_id: run for run in runs}
    lanes = {run.run_id: lane_of(number, run) for number, run in enumerate(runs)}
    for name, outcome in train_lanes(lanes, SftServer(stack, data, where, autocast)):
        outcomes[name] = outcome
        ended(stack, by_id[name])
        checkpoints.ended(name)
        stack.drop(name)
    return outcomes


def series(outcome: SftOutcome, metric: str, split: str = "train") -> list[float]:
    """Return the values of a metric in the order of steps."""
    return [point.value for point in outcome.curve if (point.split, point.metric) == (split, metric)]


def padded(split: TokenizedSplit, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return examples as users of transformers have them: ids, attention mask and labels, padded on the right."""
    examples = [split.example(int(index)) for index in indices]
    shape = len(examples), max(len(ids) for ids, _ in examples)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, (tokens, scored) in enumerate(examples):
        ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.from_numpy(np.where(scored, tokens, -100).astype(np.int64))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_peft(model: Any, run: Run) -> Any:
    """Return the model as PEFT alone trains it, in PEFT's own parametrization."""
    condition = run.condition
    if condition.method == "fullft":
        return model
    if getattr(model.config, "num_experts", None):
        return add_lora(model, condition.rank, "all", condition.alpha, True, run.seed)
    torch.manual_seed(run.seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=condition.rank, lora_alpha=condition.alpha, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(condition.init_a or 1.0)
    return model


def plain_loop(model: Any, run: Run, data: Mapping[Any, TokenizedSplit], protocol: Protocol | None = None):
    """Train as a careful user would, with padded batches, attention mask, labels and Adam; return losses and norms."""
    condition, protocol = run.condition, protocol or Protocol()
    model = with_peft(model, run)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if "lora_B" not in name], "lr": run.lr},
        {"params": [p for name, p in trained.items() if "lora_B" in name], "lr": run.lr * (condition.lr_ratio or 1.0)},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=condition.eps)
    losses, norms = [], []
    for indices in data_order(len(data["train"]), condition.steps, condition.batch_size, run.seed):
        loss = model(**padded(data["train"], indices)).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), protocol.clip_norm or float("inf")).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms
