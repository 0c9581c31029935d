"""The SFT loop: one for LoRA and full fine-tuning, which differ only in what is trainable.

Constant LR, no warm-up, Adam; the loss of a step is the token-weighted NLL of its batch. Read it top to
bottom: `train_run` is the experiment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lorabench.config import Protocol
from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.lora import adapter_pairs
from lorabench.plan import Run
from lorabench.training import stop
from lorabench.training.adapter import AdapterProbe
from lorabench.training.batches import collate, data_order, micro_batches, scored_tokens
from lorabench.training.checkpoint import load_checkpoint, save_checkpoint, trainable
from lorabench.training.distributed import whole
from lorabench.training.loss import mean_nll, nll_sum
from lorabench.training.run import Machine, Point, make_optimizer

# A run whose training loss is this many nats above a uniform guess has exploded.
EXPLODED_ABOVE_UNIFORM = 1.0


@dataclass
class Outcome:
    """What happened in a run. Losses in nats per scored token; None where a run diverged."""

    status: Literal["done", "diverged"]
    diverged_at: int | None = None
    final_valid_nll: float | None = None
    final_test_nll: float | None = None
    test_scored_tokens: int = 0
    first_epoch_nats: float | None = None
    first_epoch_scored_tokens: int | None = None
    train_tokens: int = 0
    wall_s: float = 0.0
    curve: list[Point] = field(default_factory=list)


def curve_steps(steps: int, protocol: Protocol) -> set[int]:
    """Steps after which the validation loss is taken: log-spaced, the last included, and those of the protocol."""
    spaced = {round(step) for step in np.geomspace(1, steps, protocol.curve_points)}
    return spaced | {step for step in protocol.validate_at if step <= steps}


def train_run(
    run: Run,
    model: torch.nn.Module,
    data: dict[Split, TokenizedSplit],
    protocol: Protocol,
    machine: Machine,
    checkpoint: Path,
    base_valid_nll: float,
    tick: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Train `model` (LoRA already on it, or fully trainable) as `run` says and measure it.

    Goes on from `checkpoint` if there is one and ends with the same numbers as an unbroken run.

    Args:
        base_valid_nll: validation NLL of the base model, the curve's point at step 0.
        tick: called after each step with the number of steps done.

    Returns:
        The outcome; a loss that is not finite, or that explodes, ends the run as `diverged`.
    """
    condition, train = run.condition, data["train"]
    parameters = list(trainable(model).values())
    optimizer = make_optimizer(model, run, protocol)
    # Made before a checkpoint is loaded: it remembers the initial A.
    probe = AdapterProbe(adapter_pairs(model)) if condition.method == "lora" else None
    processes = machine.processes
    order = data_order(len(train), condition.steps, condition.batch_size, run.seed)
    validate_at = curve_steps(condition.steps, protocol)
    autocast = machine.autocast(protocol)
    exploded = math.log(model.config.vocab_size) + EXPLODED_ABOVE_UNIFORM  # type: ignore[union-attr, arg-type]

    outcome = Outcome(status="done", curve=[Point(0, 0, 0, "validation", "nll", base_valid_nll)])
    first_step, epoch_nats, epoch_scored = 0, 0.0, 0
    saved = load_checkpoint(checkpoint, run.run_id, model, optimizer, processes)
    if saved is not None:
        first_step, outcome.train_tokens, outcome.wall_s = saved["step"], saved["train_tokens"], saved["wall_s"]
        epoch_nats, epoch_scored = saved["epoch_nats"], saved["epoch_scored"]
        outcome.curve = [Point(**point) for point in saved["curve"]]
    started = time.perf_counter() - outcome.wall_s
    last_saved = time.perf_counter()

    def evaluate(split: Split) -> float:
        limit, packing = machine.max_batch_tokens, machine.packing
        return mean_nll(model, data[split], limit, machine.device, autocast, processes, packing)

    def record(step: int, split: Split, metric: str, value: float) -> None:
        finite = value if math.isfinite(value) else None
        point = Point(step, step * condition.batch_size, outcome.train_tokens, split, metric, finite)
        outcome.curve.append(point)

    for step in range(first_step + 1, condition.steps + 1):
        loss, tokens, scored = _backward(model, train, order[step - 1], machine, autocast)
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, protocol.clip_norm or math.inf)).item()
        outcome.train_tokens += tokens
        record(step, "train", "nll", loss)
        record(step, "train", "grad_norm", norm)
        if processes.any(not (math.isfinite(loss) and math.isfinite(norm)) or loss > exploded):
            outcome.status, outcome.diverged_at = "diverged", step
            break
        if step * condition.batch_size <= len(train):
            epoch_nats, epoch_scored = epoch_nats + loss * scored, epoch_scored + scored
        probed = probe if step in validate_at else None
        if probed:
            probed.before_step()
        optimizer.step()
        if probed:
            for metric, value in probed.after_step().items():
                record(step, "train", metric, value)
        optimizer.zero_grad()
        if step in validate_at:
            record(step, "validation", "nll", evaluate("validation"))
        tick(step)
        stopping = processes.any(stop.requested())
        due = time.perf_counter() - last_saved >= machine.checkpoint_seconds
        if (stopping or processes.any(due)) and step < condition.steps:
            progress: dict[str, Any] = {
                "step": step,
                "train_tokens": outcome.train_tokens,
                "epoch_nats": epoch_nats,
                "epoch_scored": epoch_scored,
                "wall_s": time.perf_counter() - started,
                "curve": [vars(point) for point in outcome.curve],
            }
            save_checkpoint(checkpoint, run.run_id, model, optimizer, progress, processes)
            last_saved = time.perf_counter()
            if stopping:
                stop.end()

    if outcome.status == "done":
        valid, test = outcome.curve[-1].value, evaluate("test")
        if valid is None or not math.isfinite(test):
            outcome.status, outcome.diverged_at = "diverged", condition.steps
        else:
            outcome.final_valid_nll, outcome.final_test_nll = valid, test
            # The data's description length, if the run went through all of it (but for a last batch that is not full).
            if (condition.steps + 1) * condition.batch_size > len(train):
                outcome.first_epoch_nats, outcome.first_epoch_scored_tokens = epoch_nats, epoch_scored
    outcome.test_scored_tokens = scored_tokens(data["test"])
    outcome.wall_s = time.perf_counter() - started
    return outcome


def _backward(
    model: torch.nn.Module, train: TokenizedSplit, indices: np.ndarray, machine: Machine, autocast: torch.dtype | None
) -> tuple[float, int, int]:
    """Gradient of a batch's token-weighted NLL; returns that NLL, the batch's tokens, and those scored."""
    processes = machine.processes
    own = indices[processes.share(train.lengths()[indices])]
    lengths = train.lengths()[own]
    split = micro_batches(lengths, machine.max_batch_tokens, machine.micro_groups, machine.packing)
    parts = [collate(train, [own[row] for row in part]) for part in processes.even(split, own[:0])]
    scored = int(processes.total(sum(part.scored for part in parts)))
    loss = 0.0
    for part in parts:
        with torch.autocast(machine.device.type, dtype=autocast, enabled=autocast is not None):
            part_loss = nll_sum(model, *part.to(machine.device)) / scored
        part_loss.backward()
        loss += part_loss.item()
    processes.sum_gradients(trainable(model).values())
    return processes.total(loss), int(processes.total(lengths.sum())), scored
