"""The RL loop: one for LoRA and full fine-tuning, which differ only in what is trainable.

Each step samples a group of responses to each of its problems, grades them, and makes one update by the objective
of `objective.py`, at constant LR with Adam. Read it top to bottom: `train_rl` is the experiment.

`train_rl` is a generator: it asks for responses and gradients by yielding, so that several runs sample and learn at
once (`training/lanes.py`, `rl/serve.py`). All else it does by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lorabench.config import Protocol
from lorabench.data.reflection import reflects
from lorabench.models.lanes import Lane
from lorabench.plan import Rollouts, Run
from lorabench.training import stop
from lorabench.training.batches import data_order
from lorabench.training.checkpoints import Checkpoints
from lorabench.training.distributed import Processes
from lorabench.training.rl.objective import Group, Step
from lorabench.training.rl.problems import Grades, Problems, Texts, grade
from lorabench.training.rl.sampler import Request, Response
from lorabench.training.rl.serve import Learn, Learned, Sample, Sampled
from lorabench.training.run import Point, clip_gradient, make_optimizer

PATIENCE = 0.2
"""A run without a single reward in this share of its steps is stopped: its policy has not moved and will not."""

MIN_PATIENCE = 3
"""But not before so many steps."""

Scores = dict[str, dict[str, float]]
"""Metrics by split."""


@dataclass(frozen=True)
class Environment:
    """What a run is trained and evaluated on."""

    texts: Texts
    splits: Mapping[str, Problems]
    held_out: Mapping[str, Problems]
    grader: Grades
    held_out_graders: Mapping[str, Grades]


@dataclass
class RlOutcome:
    """What happened in a run. Rewards are greedy accuracies; None where a run diverged."""

    status: Literal["done", "diverged", "unrewarded"]
    diverged_at: int | None = None
    base_reward: float | None = None
    final_valid_reward: float | None = None
    final_reward: float | None = None
    best_reward: float | None = None
    train_tokens: int = 0
    wall_s: float = 0.0
    curve: list[Point] = field(default_factory=list)


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Steps after which to evaluate: evenly spaced, the last included."""
    return {math.ceil(steps * (number + 1) / evaluations) for number in range(evaluations)}


def evaluate(
    environment: Environment, rollouts: Rollouts, seed: int, step: int, lane: str | None
) -> Generator[Sample, Sampled, tuple[Scores, float]]:
    """Metrics of validation, test and held-out sets, and the seconds that sampling took.

    Greedy, but for held-out sets with several samples per problem, which are drawn at temperature 1.
    """
    sets = {split: (environment.splits[split], environment.grader, 1) for split in ("validation", "test")}
    for name, problems in environment.held_out.items():
        sets[name] = (problems, environment.held_out_graders[name], rollouts.held_out_samples)
    requests = [
        Request(prompt, None if samples == 1 else (seed, step, problem, sample, number), lane)
        for number, (problems, _, samples) in enumerate(sets.values())
        for problem, prompt in enumerate(problems.prompts)
        for sample in range(samples)
    ]
    sampled = yield Sample(requests)
    responses = iter(sampled.responses)
    scores: Scores = {}
    for name, (problems, grader, samples) in sets.items():
        answers = [answer for answer in problems.answers for _ in range(samples)]
        said = [next(responses) for _ in answers]
        texts = [environment.texts.text(response) for response in said]
        scores[name] = {"accuracy": float(grade(grader, texts, answers).mean()), **_lengths(said, texts)}
        if name in environment.held_out:
            scores[name] |= {"n_problems": len(problems), "n_samples": len(answers)}
    return scores, sampled.seconds


def train_rl(
    run: Run,
    lane: Lane,
    environment: Environment,
    protocol: Protocol,
    processes: Processes,
    checkpoints: Checkpoints,
    base: Scores,
    tick: Callable[[int], None] = lambda step: None,
) -> Generator[Sample | Learn, Any, RlOutcome]:
    """Train `lane` as `run` says and measure it.

    Goes on from its checkpoint if there is one and ends with the same numbers as an unbroken run.

    Args:
        checkpoints: those of the runs that are trained together.
        base: scores of the untouched base, the curve's points at step 0.
        tick: called after each step with the number of steps done.

    Yields:
        What is to be sampled or learned; what is sent back is `Sampled` or `Learned`.

    Returns:
        The outcome. A loss or gradient that is not finite ends the run as `diverged`, a base that gets no reward in
        the first fifth of the steps as `unrewarded`.
    """
    condition, rollouts = run.condition, run.condition.rollouts
    assert rollouts
    optimizer = make_optimizer(lane, run, protocol)
    train = environment.splits["train"]
    order = data_order(len(train), condition.steps, condition.batch_size // rollouts.group_size, run.seed)
    evaluate_at = evaluation_steps(condition.steps, rollouts.evaluations)

    outcome = RlOutcome("done", base_reward=base["test"]["accuracy"])
    first_step, response_tokens, rewarded = 0, 0, False
    evaluations: list[tuple[float, float]] = []

    def record(step: int, split: str, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            finite = value if math.isfinite(value) else None
            examples = step * condition.batch_size
            outcome.curve.append(Point(step, examples, response_tokens, split, metric, finite))

    saved = checkpoints.load(run.run_id, lane, optimizer)
    if saved is not None:
        first_step, outcome.train_tokens, outcome.wall_s = saved["step"], saved["train_tokens"], saved["wall_s"]
        response_tokens, rewarded = saved["response_tokens"], saved["rewarded"]
        evaluations = [(valid, test) for valid, test in saved["evaluations"]]
        outcome.curve = [Point(**point) for point in saved["curve"]]
    else:
        for split, metrics in base.items():
            record(0, split, metrics)

    for step in range(first_step + 1, condition.steps + 1):
        chosen = [int(problem) for problem in order[step - 1]]
        sampled: Sampled = yield Sample(
            [
                Request(train.prompts[problem], (run.seed, step, problem, sample), run.run_id)
                for problem in chosen
                for sample in range(rollouts.group_size)
            ]
        )
        started = time.perf_counter()
        groups, metrics = _graded(environment, chosen, sampled.responses, rollouts.group_size)
        response_tokens += sum(len(response.tokens) for response in sampled.responses)
        rewarded = rewarded or metrics["reward"] > 0
        outcome.wall_s += sampled.seconds + time.perf_counter() - started
        learned: Learned = yield Learn(groups)
        started = time.perf_counter()
        measured = learned.step
        norm = clip_gradient(lane, protocol.clip_norm)
        finite = not processes.any(not (math.isfinite(measured.loss) and math.isfinite(norm)))
        # Where the rewards of each group are equal there is no gradient, and Adam's momentum shall move nothing.
        if finite and norm > 0:
            optimizer.step()
        lane.zero_grad()
        outcome.train_tokens += measured.tokens + sum(len(group.prompt) for group in groups)
        speed = learned.tokens_per_s
        metrics |= _measures(measured) | {"grad_norm": norm}
        record(step, "train", metrics | {"sample_tokens_per_s": sampled.tokens_per_s, "learn_tokens_per_s": speed})
        outcome.wall_s += learned.seconds + time.perf_counter() - started
        if not finite:
            outcome.status, outcome.diverged_at = "diverged", step
            break
        if not rewarded and step >= max(MIN_PATIENCE, PATIENCE * condition.steps):
            outcome.status = "unrewarded"
            evaluations = [(base["validation"]["accuracy"], base["test"]["accuracy"])]
            break
        if step in evaluate_at:
            scores, seconds = yield from evaluate(environment, rollouts, run.seed, step, run.run_id)
            outcome.wall_s += seconds
            evaluations.append((scores["validation"]["accuracy"], scores["test"]["accuracy"]))
            for split, values in scores.items():
                record(step, split, values)
        tick(step)
        if checkpoints.due(step, last=step == condition.steps):
            progress: dict[str, Any] = {
                "step": step,
                "train_tokens": outcome.train_tokens,
                "response_tokens": response_tokens,
                "rewarded": rewarded,
                "wall_s": outcome.wall_s,
                "evaluations": evaluations,
                "curve": [vars(point) for point in outcome.curve],
            }
            checkpoints.save(run.run_id, lane, optimizer, progress)
            if checkpoints.stopping:
                stop.end()

    if outcome.status != "diverged":
        outcome.final_valid_reward, outcome.final_reward = evaluations[-1]
        # The first of equals; picked on validation, reported on test.
        outcome.best_reward = max(evaluations, key=lambda pair: pair[0])[1]
    return outcome


def _graded(
    environment: Environment, chosen: list[int], responses: list[Response], group_size: int
) -> tuple[list[Group], dict[str, float]]:
    """The groups of a step with their rewards, and the metrics of its responses."""
    train = environment.splits["train"]
    texts = [environment.texts.text(response) for response in responses]
    answers = [train.answers[problem] for problem in chosen for _ in range(group_size)]
    rewards = grade(environment.grader, texts, answers)
    groups = [
        Group.of(train.prompts[problem], responses[start : start + group_size], rewards[start : start + group_size])
        for start, problem in zip(range(0, len(responses), group_size), chosen, strict=True)
    ]
    equal = float(np.mean([group.equal for group in groups]))
    return groups, {"reward": float(rewards.mean()), "equal_groups": equal, **_lengths(responses, texts)}


def _lengths(responses: list[Response], texts: list[str]) -> dict[str, float]:
    return {
        "response_length": float(np.mean([len(response.tokens) for response in responses])),
        "truncated": float(np.mean([response.truncated for response in responses])),
        "reflection": float(np.mean([reflects(text) for text in texts])),
    }


def _measures(step: Step) -> dict[str, float]:
    return {
        "entropy": step.entropy,
        "kl": step.kl,
        "ratio_mean": step.ratio_mean,
        "ratio_max": step.ratio_max,
    }
