"""The RL loop. LoRA and full fine-tuning share it and differ only in the trained parameters.

Each step samples a group of responses to each of its problems, grades them, and makes one Adam update by the
objective of `objective.py`. `train_rl` is the experiment, written to be read from top to bottom.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorabench.config.experiments import Protocol
from lorabench.data.grading import reflects
from lorabench.data.problems import Controls, read_problems
from lorabench.errors import UserError
from lorabench.models.passes import trained_parameters
from lorabench.runs import MAX_KL, Rollouts, Run
from lorabench.store.schemas import CurvePoint, ExampleLoss
from lorabench.training.checkpoint import Checkpoint
from lorabench.training.rl.objective import ResponseGroup, backward
from lorabench.training.rl.sampler import Request, Response, Stop
from lorabench.training.run import (
    Machine,
    Outcome,
    clip_gradient,
    data_order,
    deterministic,
    make_optimizer,
    set_lr,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grade = Callable[[list[str], list[str]], np.ndarray]
"""Returns the rewards of responses, given their texts and the right answers, (n,): 1 for a right answer, else 0."""

Sampler = Callable[[list[Request]], list[Response]]
"""Draws a response to each request, in their order."""

PATIENCE, MIN_PATIENCE = 0.2, 3
"""A run is stopped when it had no reward, and so no update, in this share of its steps and this number at least."""

COLLAPSED_STEPS = 20
"""A run that has had rewards is ended after so many steps in a row without any, in which its policy has not changed."""

Scores = dict[str, dict[str, float]]
"""Values of metrics by split and by metric."""

Problems = list[tuple[tuple[int, ...], str]]
"""One split of a problem set: the token ids of each problem's prompt, and its answer."""


@dataclass(frozen=True)
class ProblemTexts:
    """The conversion between texts and tokens for one model and problem set, and the stops of responses."""

    tokenizer: PreTrainedTokenizerBase
    rollouts: Rollouts
    max_length: int

    @cached_property
    def stop(self) -> Stop:
        """The conditions that end a response: end token, special tokens that close a turn, stop texts, length."""
        ends = {int(self.tokenizer.eos_token_id)}
        if self.rollouts.prompt is None:
            # Base models with a chat template may close a turn by another token than their end-of-text token.
            ends |= {*self.prompt("a", "b")[len(self.prompt("a")) :]} & {*self.tokenizer.all_special_ids}
        return Stop(tuple(sorted(ends)), self.rollouts.max_new_tokens, self.rollouts.stop)

    def prompt(self, question: str, *response: str) -> tuple[int, ...]:
        """Return the token ids of a question by the preset's plain prompt, or by the chat template; then a response."""
        if self.rollouts.prompt is not None:
            encoded: Any = self.tokenizer(self.rollouts.prompt.replace("{question}", question))
        else:
            chat = [{"role": "user", "content": question}, *({"role": "assistant", "content": r} for r in response)]
            encoded = self.tokenizer.apply_chat_template(chat, add_generation_prompt=not response, return_dict=True)
        return tuple(encoded["input_ids"])

    def text(self, response: Response) -> str:
        """Return the text of a response, up to the first stop text."""
        decoded: str = self.tokenizer.decode(response.tokens, skip_special_tokens=True)
        ends = [index for text in self.rollouts.stop if (index := decoded.find(text)) >= 0]
        return decoded[: min(ends, default=len(decoded))]

    def read(self, path: Path) -> dict[str, Problems]:
        """Read the splits of a problem set's file; UserError says that a problem makes no prompt, or too long a one."""
        if self.rollouts.prompt is None and not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template; give the RL experiment a `prompt`"
            )
        splits: dict[str, Problems] = {"train": [], "validation": [], "test": []}
        for row in read_problems(path):
            prompt = self.prompt(row["question"])
            if len(prompt) + self.rollouts.max_new_tokens > self.max_length:
                raise UserError(
                    f"a problem of {len(prompt)} tokens with a response of {self.rollouts.max_new_tokens} is more than "
                    f"the {self.max_length} tokens that the model takes: {row['question'][:80]!r}"
                )
            splits[row["split"]].append((prompt, row["answer"]))
        return splits


@dataclass(frozen=True)
class Environment:
    """The problems that a run is trained and evaluated on; `held_out` sets are only evaluated.

    `controls` are the accuracies of answers that solve no problem, None where they are not known.
    """

    texts: ProblemTexts
    splits: Mapping[str, Problems]
    grade: Grade
    held_out: Mapping[str, tuple[Problems, Grade]]
    controls: Controls | None = None


@dataclass
class RlOutcome(Outcome):
    """The outcome of an RL run. Rewards are accuracies of greedy responses, and None if the run diverged.

    The rewards of the best constant answer and of the best cheap rule belong to the problem set. The entropy of the
    policy, in nats per token, and the share of truncated responses are means over the last tenth of the steps.
    """

    base_reward: float | None = None
    final_valid_reward: float | None = None
    final_reward: float | None = None
    best_reward: float | None = None
    constant_reward: float | None = None
    rule_reward: float | None = None
    rule: str | None = None
    final_entropy: float | None = None
    final_truncated: float | None = None


def evaluate(
    environment: Environment, rollouts: Rollouts, seed: int, step: int, draw: Sampler
) -> tuple[Scores, list[bool]]:
    """Return the metrics of all sets of a policy, and whether each test problem was answered right.

    Responses are greedy, but where held-out sets have several samples per problem these are drawn at temperature 1.
    """
    sets = {split: (environment.splits[split], environment.grade, 1) for split in ("validation", "test")}
    sets |= {name: (*held_out, rollouts.held_out_samples) for name, held_out in environment.held_out.items()}
    requests = [
        Request(prompt, None if samples == 1 else (seed, step, problem, sample, number))
        for number, (problems, _, samples) in enumerate(sets.values())
        for problem, (prompt, _) in enumerate(problems)
        for sample in range(samples)
    ]
    responses = iter(draw(requests))
    scores: Scores = {}
    right: list[bool] = []
    for name, (problems, grade, samples) in sets.items():
        answers = [answer for _, answer in problems for _ in range(samples)]
        drawn = [next(responses) for _ in answers]
        texts = [environment.texts.text(response) for response in drawn]
        rewards = grade(texts, answers)
        if name == "test":
            right = (rewards > 0).tolist()
        scores[name] = {"accuracy": float(rewards.mean()), **_response_metrics(drawn, texts)}
        if name in environment.held_out:
            scores[name] |= {"n_problems": len(problems), "n_samples": len(answers)}
    return scores, right


def train_rl(
    run: Run,
    model: torch.nn.Module,
    environment: Environment,
    protocol: Protocol,
    machine: Machine,
    checkpoint: Checkpoint,
    draw: Sampler,
    base: Scores,
    tick: Callable[[int], None] = lambda step: None,
) -> RlOutcome:
    """Train a base model, or one with a new adapter, in place, and return the outcome.

    The run goes on from its checkpoint if there is one, and then ends with the same numbers as an uninterrupted run. It
    is `diverged` if a loss or a gradient norm is not finite, `unrewarded` if no response got a reward in the first
    fifth of the steps (see `PATIENCE`), and `collapsed` if none did in many steps after others had (see
    `COLLAPSED_STEPS`). `draw` draws from the present policy, `base` are the base model's scores, and `tick` is called
    after each step with the number of finished steps.
    """
    condition, rollouts, processes = run.condition, run.condition.rollouts, machine.processes
    assert rollouts
    parameters = trained_parameters(model)
    optimizer = make_optimizer(parameters, run, protocol)
    prompts, answers = zip(*environment.splits["train"], strict=True)
    order = data_order(len(prompts), condition.steps, condition.batch_size // rollouts.group_size, run.seed)
    # Evaluations are evenly spaced, and the last step has one.
    evaluate_at = {math.ceil(condition.steps * (n + 1) / rollouts.evaluations) for n in range(rollouts.evaluations)}

    outcome = RlOutcome("done", base_reward=base["test"]["accuracy"])
    if environment.controls is not None:
        outcome.constant_reward, outcome.rule_reward = environment.controls.constant, environment.controls.rule
        outcome.rule = environment.controls.rule_text
    first_step, response_tokens, rewarded_at = 0, 0, 0
    evaluations: list[tuple[float, float]] = []
    right: list[bool] = []

    def record(step: int, split: str, metrics: Mapping[str, float]) -> None:
        outcome.record(step, step * condition.batch_size, response_tokens, split, metrics)

    def save(step: int) -> None:
        counts = {"step": step, "response_tokens": response_tokens, "evaluations": evaluations, "right": right}
        checkpoint.save(parameters, optimizer, outcome.progress() | counts)

    def evaluated(step: int) -> Scores:
        """Evaluate the policy as after a step, and return its scores."""
        nonlocal right
        started = time.perf_counter()
        scores, right = evaluate(environment, rollouts, run.seed, step, draw)
        outcome.wall_s += time.perf_counter() - started
        evaluations.append((scores["validation"]["accuracy"], scores["test"]["accuracy"]))
        return scores

    def finish(step: int) -> None:
        """Evaluate after a step where that is due, and save where that is due."""
        if step in evaluate_at:
            for split, values in evaluated(step).items():
                record(step, split, values)
        tick(step)
        if step < condition.steps and checkpoint.due():
            save(step)

    saved = checkpoint.load(parameters, optimizer)
    if saved is not None:
        outcome.resume(saved)
        first_step, response_tokens = saved["step"], saved["response_tokens"]
        rewarded_at = max((point.step for point in _train_points(outcome.curve, "reward") if point.value), default=0)
        evaluations, right = [(valid, test) for valid, test in saved["evaluations"]], saved["right"]
        # The run was interrupted in the evaluation of this step.
        if first_step in evaluate_at and outcome.curve[-1].split == "train":
            finish(first_step)
    else:
        for split, metrics in base.items():
            record(0, split, metrics)

    for step in range(first_step + 1, condition.steps + 1):
        if rewarded_at and step - rewarded_at > COLLAPSED_STEPS:
            outcome.status = "collapsed"
            save(step - 1)
            # The steps that are left out would not change the policy either, as long as none of them had a reward. The
            # mean of what the last steps drew from the same policy is expected of them.
            scores, expected = evaluated(condition.steps), {"reward": 0.0}
            for metric in ("response_length", "truncated", "reflection", "entropy"):
                last = [point.value for point in _train_points(outcome.curve, metric)[-COLLAPSED_STEPS:]]
                expected[metric] = float(np.mean([math.nan if value is None else value for value in last]))
            for later in range(step, condition.steps + 1):
                record(later, "train", expected)
                for split, values in scores.items() if later in evaluate_at else ():
                    record(later, split, values)
            break
        started, size = time.perf_counter(), rollouts.group_size
        problems = np.repeat(order[step - 1], size).tolist()
        requests = [
            Request(prompts[problem], (run.seed, step, problem, number % size))
            for number, problem in enumerate(problems)
        ]
        responses = draw(requests)
        texts = [environment.texts.text(response) for response in responses]
        rewards = environment.grade(texts, [answers[problem] for problem in problems])
        groups = [
            ResponseGroup.of(prompts[problems[part.start]], responses[part], rewards[part])
            for part in (slice(start, start + size) for start in range(0, len(responses), size))
        ]
        metrics = {"reward": float(rewards.mean()), "equal_groups": float(np.mean([group.equal for group in groups]))}
        metrics |= _response_metrics(responses, texts)
        step_tokens = sum(len(response.tokens) for response in responses)
        response_tokens += step_tokens
        rewarded_at = step if metrics["reward"] > 0 else rewarded_at

        with deterministic(machine.device):
            measured = backward(model, groups, machine)
        norm = clip_gradient(parameters.values(), protocol.clip_norm)
        finite = not processes.any(not (math.isfinite(measured.loss) and math.isfinite(norm)))
        # If all rewards are equal within each group there is no gradient, and Adam's momentum must change nothing.
        if finite and norm > 0:
            set_lr(optimizer, step, condition.steps, protocol)
            optimizer.step()
        optimizer.zero_grad()
        outcome.train_tokens += step_tokens + sum(len(group.prompt) for group in groups)
        # The estimate of KL may be negative, but far below 0 it says as well that the two distributions differ.
        if processes.first and not abs(measured.kl) <= MAX_KL:
            logging.warning(
                "run %s, step %d: sampler and learner differ by a KL of %.2g nats per token; above %g the gradient is "
                "noisy",
                *(run.run_id, step, measured.kl, MAX_KL),
            )
        metrics |= {name: value for name, value in vars(measured).items() if name not in ("tokens", "loss")}
        record(step, "train", metrics | {"grad_norm": norm})
        outcome.wall_s += time.perf_counter() - started
        if not finite:
            outcome.status, outcome.diverged_at = "diverged", step
            break
        if not rewarded_at and step >= max(MIN_PATIENCE, PATIENCE * condition.steps):
            outcome.status = "unrewarded"
            evaluations = [(base["validation"]["accuracy"], base["test"]["accuracy"])]
            break
        # An evaluation may take longer than many steps, so the step is saved before it.
        if step in evaluate_at:
            save(step)
        finish(step)

    for metric in ("entropy", "truncated"):
        points = _train_points(outcome.curve, metric)
        ends = [point.value for point in points[-math.ceil(len(points) / 10) :] if point.value is not None]
        setattr(outcome, f"final_{metric}", float(np.mean(ends)) if ends else None)
    if outcome.status != "diverged":
        outcome.final_valid_reward, outcome.final_reward = evaluations[-1]
        # The evaluation is chosen by the validation split (the first of equal ones) and reported on the test split.
        outcome.best_reward = max(evaluations, key=lambda pair: pair[0])[1]
    if outcome.status in ("done", "collapsed"):
        outcome.test_losses = [ExampleLoss(1.0 - answered, 1) for answered in right]
    return outcome


def _train_points(curve: list[CurvePoint], metric: str) -> list[CurvePoint]:
    return [point for point in curve if point.split == "train" and point.metric == metric]


def _response_metrics(responses: list[Response], texts: list[str]) -> dict[str, float]:
    return {
        "response_length": float(np.mean([len(response.tokens) for response in responses])),
        "truncated": float(np.mean([response.truncated for response in responses])),
        "reflection": float(np.mean([reflects(text) for text in texts])),
    }
