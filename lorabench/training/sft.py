"""Supervised fine-tuning. LoRA and full fine-tuning share the loop and differ only in the trained parameters.

A run has an LR without warm-up, Adam, and as loss of a step the token-weighted NLL of its batch. `train_sft` is
the experiment, written to be read from top to bottom.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorabench.config.experiments import Protocol
from lorabench.config.fields import CHANGES_BASE
from lorabench.config.inputs import curve_examples
from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.models.lora import adapter_pairs
from lorabench.models.passes import trained_parameters
from lorabench.runs import Run
from lorabench.store.schemas import CurvePoint, ExampleLoss
from lorabench.training.checkpoint import Checkpoint
from lorabench.training.context import Base, SweepContext
from lorabench.training.distributed import full_tensor
from lorabench.training.loss import batch_gradient, example_nlls, mean_nll, scored_by_example
from lorabench.training.run import Machine, Outcome, clip_gradient, data_order, make_optimizer, set_lr

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
    """Return the steps after which the validation loss is measured: log-spaced, and the protocol's `validate_at`."""
    spaced = {round(step) for step in np.geomspace(1, steps, protocol.curve_points)}
    return spaced | {step for step in protocol.validate_at if step <= steps}


class ValidationCurve:
    """Measures the validation losses of runs: at every point on `number` examples (None: all), and at the end on all.

    The examples of a curve have a loss that differs from that of all, by nearly as much at one step as at another. So
    each point is their loss plus what the base model's loss on all examples has above its loss on these. `base` is the
    base model's NLL of each example of the split in nats, (examples,).
    """

    def __init__(self, split: TokenizedSplit, number: int | None, base: np.ndarray) -> None:
        number = min(number or len(split), len(split))
        # They are spread evenly, since a dataset may be ordered by subject.
        self._chosen = np.arange(number) * len(split) // number
        self._split, self._scored = split, scored_by_example(split)
        self._curve = split if number == len(split) else split.chosen(self._chosen)
        self.base_nll = float(base.sum()) / int(self._scored.sum())
        """The base model's loss on all examples in nats per scored token, which is the curve's point at step 0."""
        self._above = self.base_nll - self._mean(base)

    def _mean(self, nats: np.ndarray) -> float:
        return float(nats[self._chosen].sum()) / int(self._scored[self._chosen].sum())

    def point(self, model: torch.nn.Module, machine: Machine) -> float:
        """Return a point of the curve in nats per scored token."""
        return mean_nll(model, self._curve, machine) + self._above

    def last(self, model: torch.nn.Module, machine: Machine) -> tuple[float, float]:
        """Return the curve's last point and the loss on all examples, in nats per scored token."""
        nats = example_nlls(model, self._split, machine)
        return self._mean(nats) + self._above, float(nats.sum()) / int(self._scored.sum())


def train_sft(
    run: Run,
    model: torch.nn.Module,
    data: Mapping[Split, TokenizedSplit],
    protocol: Protocol,
    machine: Machine,
    checkpoint: Checkpoint,
    validation: ValidationCurve,
    tick: Callable[[int], None] = lambda step: None,
) -> SftOutcome:
    """Train a base model, or one with a new adapter, in place, and return the outcome.

    The run goes on from its checkpoint if there is one, and then ends with the same numbers as an uninterrupted run. It
    is `diverged` if a loss or a gradient norm is not finite, or if the loss exceeds that of a uniform guess by
    `EXPLODED_ABOVE_UNIFORM`. `tick` is called after each step with the number of finished steps. UserError says that
    the gradient of the first step is 0, or a later step has none.
    """
    condition, train = run.condition, data["train"]
    parameters = trained_parameters(model)
    optimizer = make_optimizer(parameters, run, protocol)
    # The weights of DoRA and full fine-tuning are no base plus a product of two factors.
    pairs = adapter_pairs(model) if condition.method in ("lora", *CHANGES_BASE) else {}
    # A checkpoint, which is loaded below, has another A.
    initial_a = {name: a.detach().clone() for name, (a, _, _) in pairs.items()}
    order = data_order(len(train), condition.steps, condition.batch_size, run.seed)
    validate_at = curve_steps(condition.steps, protocol)
    probe_at = validate_at | {round(step) for step in np.geomspace(1, condition.steps, protocol.probe_points or 0)}
    config: Any = model.config
    exploded = math.log(config.vocab_size) + EXPLODED_ABOVE_UNIFORM

    outcome = SftOutcome(status="done", curve=[CurvePoint(0, 0, 0, "validation", "nll", validation.base_nll)])
    first_step, epoch_nats, epoch_scored, valid = 0, 0.0, 0, math.nan
    saved = checkpoint.load(parameters, optimizer)
    if saved is not None:
        outcome.resume(saved)
        first_step, epoch_nats, epoch_scored = saved["step"], saved["epoch_nats"], saved["epoch_scored"]

    def record(step: int, split: Split, metrics: Mapping[str, float]) -> None:
        outcome.record(step, step * condition.batch_size, outcome.train_tokens, split, metrics)

    for step in range(first_step + 1, condition.steps + 1):
        started = time.perf_counter()
        loss, tokens, scored = batch_gradient(model, train, order[step - 1], machine)
        norm = clip_gradient(parameters.values(), protocol.clip_norm)
        outcome.train_tokens += tokens
        record(step, "train", {"nll": loss, "grad_norm": norm})
        if machine.processes.any(not (math.isfinite(loss) and math.isfinite(norm)) or loss > exploded):
            outcome.status, outcome.diverged_at = "diverged", step
            break
        # Weights that overflow may leave a later gradient of 0, but a gradient all the same.
        if norm == 0 and (step == 1 or all(parameter.grad is None for parameter in parameters.values())):
            raise UserError(
                f"run {run.run_id} would train nothing: the gradient of step {step} is exactly 0 at a loss of "
                f"{loss:.4f} nats, where it must be above 0"
            )
        if step * condition.batch_size <= len(train):
            epoch_nats, epoch_scored = epoch_nats + loss * scored, epoch_scored + scored
        set_lr(optimizer, step, condition.steps, protocol)
        if pairs and step in probe_at:
            record(step, "train", measured_step(pairs, initial_a, optimizer))
        else:
            optimizer.step()
        optimizer.zero_grad()
        if step == condition.steps:
            point, valid = validation.last(model, machine)
            record(step, "validation", {"nll": point})
        elif step in validate_at:
            record(step, "validation", {"nll": validation.point(model, machine)})
        outcome.wall_s += time.perf_counter() - started
        tick(step)
        if step < condition.steps and checkpoint.due():
            epoch = {"epoch_nats": epoch_nats, "epoch_scored": epoch_scored}
            checkpoint.save(parameters, optimizer, {"step": step, **epoch, **outcome.progress()})

    scored_tests = scored_by_example(data["test"])
    outcome.test_scored_tokens = int(scored_tests.sum())
    if outcome.status == "done":
        started = time.perf_counter()
        nats = example_nlls(model, data["test"], machine)
        outcome.wall_s += time.perf_counter() - started
        test = float(nats.sum()) / outcome.test_scored_tokens
        if not (math.isfinite(valid) and math.isfinite(test)):
            outcome.status, outcome.diverged_at = "diverged", condition.steps
        else:
            outcome.final_valid_nll, outcome.final_test_nll = valid, test
            outcome.test_losses = list(map(ExampleLoss, nats.tolist(), scored_tests.tolist()))
            # The description length of the data, if the run has seen all of it except an incomplete last batch.
            if (condition.steps + 1) * condition.batch_size > len(train):
                outcome.first_epoch_nats, outcome.first_epoch_scored_tokens = epoch_nats, epoch_scored
    return outcome


Pair = tuple[Tensor, Tensor, float]
"""The factors of a layer, A (r, d_in) and B (d_out, r), and its scaling: W' = W + scaling * B A."""


@torch.no_grad()
def measured_step(
    pairs: Mapping[str, Pair], initial_a: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Make an optimizer step of a LoRA adapter, given its pairs by layer, and return measures of the step by name.

    - a_moved: mean over layers of ||A - A0||_F / ||A0||_F.
    - update_norm: root of the sum over layers of ||W'_after - W'_before||_F^2.
    - b_over_a: share of layers whose B has a larger spectral norm than A.
    - descent: -<update of all A and B, gradient>, the first-order fall of the batch's loss in nats.

    They need no matrix of the layer's size: with U of few columns and V of few rows, ||U V||_F^2 is the sum over
    entries of (U^T U) * (V V^T), and the singular values of U are the square roots of the eigenvalues of U^T U.
    """
    before = {name: (full_tensor(a).clone(), full_tensor(b).clone()) for name, (a, b, _) in pairs.items()}
    optimizer.step()
    layers = []
    for name, (own_a, own_b, scaling) in pairs.items():
        (old_a, old_b), a, b = before.pop(name), full_tensor(own_a), full_tensor(own_b)
        a_step, b_step = (a - old_a).double(), (b - old_b).double()
        gradients = (torch.zeros_like(own) if own.grad is None else own.grad for own in (own_a, own_b))
        a_grad, b_grad = map(full_tensor, gradients)
        descent = -(a_step * a_grad).sum() - (b_step * b_grad).sum()
        # B'A' - BA = (B' - B) A' + B (A' - A).
        left = torch.cat([b_step, old_b.double()], dim=1)
        right = torch.cat([a.double(), a_step], dim=0)
        update = scaling**2 * ((left.T @ left) * (right @ right.T)).sum()
        initial = full_tensor(initial_a[name])
        moved = (a - initial).double().norm() / initial.double().norm()
        grams = torch.stack([a.double() @ a.double().T, b.double().T @ b.double()])
        # The decomposition raises on NaN, which a diverging run may contain; other measures then show the NaN.
        largest = torch.linalg.eigvalsh(torch.nan_to_num(grams))[:, -1]
        layers.append(torch.stack([moved, update, descent, (largest[1] > largest[0]).double()]))
    # All results are transferred at once. Rounding may leave the squared norm of a step without change below zero.
    moved, update, descent, larger = torch.stack(layers).T
    measures = torch.stack([moved.mean(), update.sum().clamp(min=0).sqrt(), larger.mean(), descent.sum()])
    return dict(zip(("a_moved", "update_norm", "b_over_a", "descent"), measures.tolist(), strict=True))


class SftTrainer:
    """Trains the runs of a job's sweeps, which share one model and one dataset; the base model is evaluated once."""

    def __init__(self) -> None:
        self._base = Base()
        self._data: dict[Split, TokenizedSplit] = {}
        self._environment: dict[str, Any] = {}
        self._validation: ValidationCurve | None = None

    def __call__(self, context: SweepContext, run: Run, tick: Callable[[int], None]) -> None:
        """Train a run and write it; UserError says that the base model's loss is worse than that of a uniform guess."""
        protocol, machine, model = context.plan.preset.protocol, context.machine, run.condition.model
        if not self._data:
            tokenizer = load_tokenizer(context.layout.model(model))
            key = cache_key(tokenizer, context.layout.dataset(run.condition.dataset))
            self._data = read_tokens(context.layout.tokens(model, run.condition.dataset), key)
            self._environment = context.provenance() | {f"{name}_sha256": value for name, value in key.items()}
        if self._validation is None:
            base: Any = self._base.sharded(context)
            split, spec = self._data["validation"], context.plan.preset.datasets[run.condition.dataset]
            validation = ValidationCurve(split, curve_examples(spec), example_nlls(base, split, machine))
            uniform = math.log(base.config.vocab_size)
            del base
            if not validation.base_nll < uniform + 1:
                raise UserError(
                    f"base model {model} has a validation loss of {validation.base_nll:.2f} nats, worse than guessing "
                    f"({uniform:.2f}): wrong weights or tokenizer"
                )
            self._validation = validation
        environment = self._environment | {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        with self._base.trainable(context, run) as trained:
            checkpoint = context.checkpoint(run)
            outcome = train_sft(run, trained, self._data, protocol, machine, checkpoint, self._validation, tick)
            context.write(run, trained, outcome, environment)
