"""The SFT loop. LoRA and full fine-tuning share it and differ only in the trained parameters.

A run has a constant LR without warm-up, Adam, and as loss of a step the token-weighted NLL of its batch.

`train_sft` is the experiment, written to be read from top to bottom. It is a generator that requests gradients and
measurements by yielding, so that those of several runs are computed as one batch (`training/drive.py`,
`training/sft/serve.py`); it does everything else itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorabench.config.experiments import Protocol
from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit
from lorabench.models.lanes.shelf import Lane
from lorabench.runs import Run
from lorabench.store.schemas import CurvePoint, ExampleLoss
from lorabench.training.adapter import AdapterProbe
from lorabench.training.batches import data_order, scored_by_example, scored_tokens
from lorabench.training.distributed import Processes
from lorabench.training.lane_checkpoints import LaneCheckpoints
from lorabench.training.run import Outcome, clip_gradient, make_optimizer
from lorabench.training.sft.serve import NllRequest, SftGradientRequest, SftResult
from lorabench.utils import signals

EXPLODED_ABOVE_UNIFORM = 1.0
"""A run has diverged if its training loss is this many nats per token above that of a uniform guess."""


@dataclass
class SftOutcome(Outcome):
    """The outcome of an SFT run. Losses are in nats per scored token, and None if the run diverged."""

    final_valid_nll: float | None = None
    final_test_nll: float | None = None
    test_scored_tokens: int = 0
    first_epoch_nats: float | None = None
    first_epoch_scored_tokens: int | None = None


def curve_steps(steps: int, protocol: Protocol) -> set[int]:
    """Return the steps after which the validation loss is measured.

    They are log-spaced from 1 to the last step, with the steps of the protocol's `validate_at` added.
    """
    spaced = {round(step) for step in np.geomspace(1, steps, protocol.curve_points)}
    return spaced | {step for step in protocol.validate_at if step <= steps}


def train_sft(
    run: Run,
    lane: Lane,
    vocabulary: int,
    data: Mapping[Split, TokenizedSplit],
    protocol: Protocol,
    processes: Processes,
    checkpoints: LaneCheckpoints,
    base_valid_nll: float,
    tick: Callable[[int], None] = lambda step: None,
) -> Generator[SftGradientRequest | NllRequest, SftResult, SftOutcome]:
    """Train and evaluate one run on its lane.

    The run goes on from its checkpoint if there is one, and then ends with the same numbers as an uninterrupted run.

    Args:
        vocabulary: the size of the model's vocabulary.
        checkpoints: the checkpoints of the runs that are trained together.
        base_valid_nll: validation NLL of the base model, the curve's point at step 0.
        tick: called after each step with the number of finished steps.

    Yields:
        Requests for a gradient or an NLL; the caller sends back an `SftResult`.

    Returns:
        The outcome. It is `diverged` if a loss or a gradient norm is not finite, or if the loss exceeds that of a
        uniform guess by `EXPLODED_ABOVE_UNIFORM`.
    """
    condition, train = run.condition, data["train"]
    optimizer = make_optimizer(lane, run, protocol)
    # The probe is constructed before a checkpoint is loaded since it remembers the initial A.
    probe = AdapterProbe(lane.pairs) if condition.method == "lora" else None
    order = data_order(len(train), condition.steps, condition.batch_size, run.seed)
    validate_at = curve_steps(condition.steps, protocol)
    exploded = math.log(vocabulary) + EXPLODED_ABOVE_UNIFORM

    outcome = SftOutcome(status="done", curve=[CurvePoint(0, 0, 0, "validation", "nll", base_valid_nll)])
    first_step, epoch_nats, epoch_scored = 0, 0.0, 0
    saved = checkpoints.load(run.run_id, lane, optimizer)
    if saved is not None:
        first_step, outcome.train_tokens, outcome.wall_s = saved["step"], saved["train_tokens"], saved["wall_s"]
        epoch_nats, epoch_scored = saved["epoch_nats"], saved["epoch_scored"]
        outcome.curve = [CurvePoint(**point) for point in saved["curve"]]

    def record(step: int, split: Split, metric: str, value: float) -> None:
        finite = value if math.isfinite(value) else None
        point = CurvePoint(step, step * condition.batch_size, outcome.train_tokens, split, metric, finite)
        outcome.curve.append(point)

    for step in range(first_step + 1, condition.steps + 1):
        learned = yield SftGradientRequest(order[step - 1])
        started = time.perf_counter()
        loss = learned.nll
        norm = clip_gradient(lane, protocol.clip_norm)
        outcome.train_tokens += learned.tokens
        outcome.wall_s += learned.seconds
        record(step, "train", "nll", loss)
        record(step, "train", "grad_norm", norm)
        if processes.any(not (math.isfinite(loss) and math.isfinite(norm)) or loss > exploded):
            outcome.status, outcome.diverged_at = "diverged", step
            break
        if step * condition.batch_size <= len(train):
            epoch_nats, epoch_scored = epoch_nats + loss * learned.scored, epoch_scored + learned.scored
        probed = probe if step in validate_at else None
        if probed:
            probed.before_step()
        optimizer.step()
        if probed:
            for metric, value in probed.after_step().items():
                record(step, "train", metric, value)
        lane.zero_grad()
        outcome.wall_s += time.perf_counter() - started
        if step in validate_at:
            measured = yield NllRequest("validation")
            outcome.wall_s += measured.seconds
            record(step, "validation", "nll", measured.nll)
        tick(step)
        if checkpoints.due(step, last=step == condition.steps):
            progress: dict[str, Any] = {
                "step": step,
                "train_tokens": outcome.train_tokens,
                "epoch_nats": epoch_nats,
                "epoch_scored": epoch_scored,
                "wall_s": outcome.wall_s,
                "curve": [vars(point) for point in outcome.curve],
            }
            checkpoints.save(run.run_id, lane, optimizer, progress)
            if checkpoints.stopping:
                signals.raise_stopped()

    if outcome.status == "done":
        measured = yield NllRequest("test")
        outcome.wall_s += measured.seconds
        valid, test = outcome.curve[-1].value, measured.nll
        if valid is None or not math.isfinite(test):
            outcome.status, outcome.diverged_at = "diverged", condition.steps
        else:
            outcome.final_valid_nll, outcome.final_test_nll = valid, test
            assert measured.example_nats is not None
            scored = scored_by_example(data["test"])
            outcome.test_losses = list(map(ExampleLoss, measured.example_nats.tolist(), scored.tolist()))
            # The description length of the data, if the run has seen all of it except an incomplete last batch.
            if (condition.steps + 1) * condition.batch_size > len(train):
                outcome.first_epoch_nats, outcome.first_epoch_scored_tokens = epoch_nats, epoch_scored
    outcome.test_scored_tokens = scored_tokens(data["test"])
    return outcome
