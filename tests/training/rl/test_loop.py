"""The RL loop is on-policy, changes the policy, can be resumed, and changes nothing without differing rewards."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.runs import Run
from lorabench.training.rl import loop
from lorabench.training.rl.loop import ProblemTexts
from lorabench.training.rl.sampler import Request, Response

from ..conftest import BrokenError, breaking_at
from .conftest import ROLLOUTS, TINY, condition_of, drawn, problem_file, same_tokens, train

BATCH = 16
"""Responses of a training step; no evaluation has as many."""


def same_base(model, other) -> bool:
    """Return whether two models have equal weights, without adapters."""
    first, second = (
        [parameter for name, parameter in sorted(each.named_parameters()) if ".lora_" not in name]
        for each in (model, other)
    )
    return all(map(torch.equal, first, second))


def metric(outcome, name, split="train"):
    return [point.value for point in outcome.curve if (point.metric, point.split) == (name, split)]


def until(environment, steps, then, first=1):
    """Return an environment in which rewards are multiplied by `then`, or set to 1, after some training steps."""
    batches, grade = iter(range(first, 100)), environment.grade

    def graded(responses, answers):
        if len(responses) != BATCH or next(batches) <= steps:
            return grade(responses, answers)
        return np.full(len(responses), float(then))

    return replace(environment, grade=graded)


def test_a_run_is_on_policy_and_its_policy_moves(environment, tmp_path, prompts, tokenizer, base):
    outcome, model = train(Run(condition_of(2), 2e-3, 0), environment, tmp_path)
    assert outcome.status == "done"
    # One update per batch: sampler and learner are the same policy at every step.
    assert metric(outcome, "ratio_max") == pytest.approx([1.0] * 4, abs=1e-4)
    assert metric(outcome, "ratio_mean") == pytest.approx([1.0] * 4, abs=1e-4)
    assert np.abs(metric(outcome, "kl")).max() < 1e-4
    assert metric(outcome, "ratio_above_2") == [0.0] * 4
    assert same_base(model, base), "LoRA leaves the base as it was"
    requests = [Request(prompt, (0, 0, n, s)) for n, prompt in enumerate(prompts[:10]) for s in range(4)]
    assert not same_tokens(drawn(model, tokenizer, requests), drawn(base, tokenizer, requests))
    for name in ("reward", "response_length", "truncated", "equal_groups", "reflection", "entropy", "grad_norm"):
        assert np.isfinite(metric(outcome, name)).tolist() == [True] * 4, name
    assert outcome.final_reward == metric(outcome, "accuracy", "test")[-1]
    assert outcome.final_reward == 1 - np.mean([problem.loss for problem in outcome.test_losses])
    assert outcome.final_valid_reward == metric(outcome, "accuracy", "validation")[-1]
    assert outcome.base_reward == metric(outcome, "accuracy", "test")[0]
    validation, test = (metric(outcome, "accuracy", split)[1:] for split in ("validation", "test"))
    assert outcome.best_reward == test[np.argmax(validation)]


def test_equal_rewards_change_nothing(environment, tmp_path, base):
    """Adam's momentum of a step with differing rewards must not move the policy."""
    (_, first), (outcome, second) = (
        train(Run(condition_of(None, steps), 1e-3, 0), until(environment, 1, then=1), tmp_path / str(steps))
        for steps in (1, 2)
    )
    assert (metric(outcome, "equal_groups")[1], metric(outcome, "grad_norm")[1]) == (1.0, 0.0)
    assert same_base(first, second)
    assert not same_base(first, base)


def test_a_sampler_whose_numbers_are_not_finite_is_warned_about_and_the_run_diverged(environment, tmp_path, caplog):
    def broken(draw):
        return lambda requests: [Response(r.tokens, r.logprobs * np.nan, r.truncated) for r in draw(requests)]

    run = Run(condition_of(None, steps=2), 1e-4, 0)
    outcome, _ = train(run, environment, tmp_path, sampler=broken)
    assert (outcome.status, outcome.diverged_at) == ("diverged", 1)
    [message] = caplog.messages
    assert message.startswith(f"run {run.run_id}, step 1: sampler and learner differ by a KL of nan nats")


def test_a_base_without_any_reward_is_stopped(environment, tmp_path, base):
    never = replace(environment, grade=lambda responses, answers: np.zeros(len(responses)))
    outcome, model = train(Run(condition_of(None, steps=15), 1e-3, 0), never, tmp_path)
    assert outcome.status == "unrewarded"
    assert metric(outcome, "reward") == [0.0] * 3
    assert (outcome.base_reward, outcome.final_valid_reward, outcome.final_reward, outcome.best_reward) == (0,) * 4
    assert same_base(model, base)


def test_a_collapsed_run_is_ended_with_the_results_that_it_would_have(environment, tmp_path, base, monkeypatch):
    """Its policy is frozen in steps without a reward, so that all later evaluations are the one at its end."""
    run, started, right_steps = Run(condition_of(None, steps=6), 1e-3, 0), [], 1
    monkeypatch.setattr(loop, "COLLAPSED_STEPS", 100)
    whole, whole_model = train(run, until(environment, right_steps, then=0), tmp_path / "whole")
    monkeypatch.setattr(loop, "COLLAPSED_STEPS", 3)
    ended, model = train(run, until(environment, right_steps, then=0), tmp_path / "ended", started.append)
    assert (whole.status, ended.status) == ("done", "collapsed")
    assert started == list(range(1, right_steps + 4))
    assert same_base(model, whole_model)
    assert not same_base(model, base)
    for name in ("base_reward", "final_valid_reward", "final_reward", "best_reward", "test_losses"):
        assert getattr(ended, name) == getattr(whole, name), name
    assert ended.train_tokens < whole.train_tokens
    # The curve is the same but for what the remaining steps draw, where the mean of the last steps stands in.
    same = {(point.step, point.split, point.metric): point.value for point in ended.curve}
    for point in whole.curve:
        place = point.step, point.split, point.metric
        if point.step <= right_steps + 3 or point.split != "train" or point.metric == "reward":
            assert same[place] == point.value, place
        elif point.metric in ("response_length", "entropy"):
            last = [same[step, "train", point.metric] for step in range(right_steps + 1, right_steps + 4)]
            assert same[place] == pytest.approx(np.mean(last))
        else:
            assert place not in same or point.metric in ("truncated", "reflection"), place
    assert same.keys() <= {(point.step, point.split, point.metric) for point in whole.curve}
    # A run that is killed within these steps ends in the same way.
    killed = until(environment, right_steps, then=0)
    with pytest.raises(BrokenError):
        train(run, killed, tmp_path / "killed", breaking_at(right_steps + 2), checkpoint_seconds=0)
    resumed, _ = train(run, until(environment, right_steps, then=0, first=right_steps + 2), tmp_path / "killed")
    assert resumed.curve == ended.curve
    assert resumed.test_losses == ended.test_losses


def test_a_run_killed_in_a_step_or_in_an_evaluation_ends_as_an_unbroken_one(environment, tmp_path):
    """In a step there is a checkpoint of the one before; between evaluations there is only that before the last one."""
    run = Run(condition_of(2, steps=3), 3e-3, 0)

    def train_until(name, step=None, evaluation=None, **changes):
        """Return the outcome, and what was drawn for: training or an evaluation."""
        drawn_for, outcome = [], None

        def killing(draw):
            def drawing(requests):
                drawn_for.append("evaluation" if requests[0].key is None else "training")
                if drawn_for.count("evaluation") == evaluation:
                    raise BrokenError
                return draw(requests)

            return drawing

        with suppress(BrokenError):
            outcome, _ = train(run, environment, tmp_path / name, breaking_at(step), sampler=killing, **changes)
        return outcome, drawn_for

    unbroken, whole = train_until("unbroken")
    assert train_until("step", step=2, checkpoint_seconds=0)[0] is None
    killed, before = train_until("evaluation", evaluation=1)
    assert killed is None
    for folder in ("step", "evaluation"):
        resumed, after = train_until(folder)
        assert {**vars(resumed), "wall_s": 0} == {**vars(unbroken), "wall_s": 0}
    # The run resumed last starts with the evaluation, and repeats no step.
    assert after[0] == "evaluation"
    assert before.count("training") + after.count("training") == whole.count("training") == 3


def test_another_seed_draws_other_samples_and_held_out_problems_are_not_trained_on(environment, tmp_path, tokenizer):
    rollouts = replace(ROLLOUTS, held_out=("sums",), held_out_samples=3)
    path = problem_file(tmp_path, tasks=["chain_sum"], max_digits=1)
    sums = ProblemTexts(tokenizer, rollouts, 512).read(path)["test"]
    both = replace(environment, held_out={"sums": (sums, environment.grade)})
    with_sums, _ = train(Run(condition_of(None, 2, rollouts=rollouts), 1e-4, 0), both, tmp_path)
    without, other = (train(Run(condition_of(None, 2), 1e-4, seed), environment, tmp_path)[0] for seed in (0, 1))
    assert metric(with_sums, "n_problems", "sums") == [8] * 3
    assert metric(with_sums, "n_samples", "sums") == [24] * 3
    assert metric(with_sums, "reward") == metric(without, "reward")
    assert with_sums.final_reward == without.final_reward
    assert metric(without, "response_length") != metric(other, "response_length")
    assert without.base_reward == other.base_reward


def test_a_prompt_is_a_chat_up_to_the_assistant_or_a_text_and_what_closes_a_turn_ends_a_response(tmp_path):
    tokenizer = load_tokenizer(TINY)
    with pytest.raises(UserError, match="a response of 8 is more than the 40 tokens that the model takes"):
        ProblemTexts(tokenizer, ROLLOUTS, 40).read(problem_file(tmp_path))
    texts = ProblemTexts(tokenizer, ROLLOUTS, 512)
    assert tokenizer.decode(texts.prompt("What is 1 + 1?")) == "<|user|>What is 1 + 1?<|assistant|>"
    assert texts.stop.tokens == (tokenizer.eos_token_id,)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|pad|>")
    both = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert set(ProblemTexts(tokenizer, ROLLOUTS, 512).stop.tokens) == both
    # A plain prompt needs no template.
    tokenizer.chat_template = None
    texts = ProblemTexts(tokenizer, replace(ROLLOUTS, prompt="Question: {question}\nAnswer:", stop=("\n",)), 512)
    assert tokenizer.decode(texts.prompt("{x} + 1?")) == "Question: {x} + 1?\nAnswer:"
    assert texts.stop.tokens == (tokenizer.eos_token_id,)
    said = np.array(tokenizer(" 12\nQuestion").input_ids)
    assert texts.text(Response(said, np.zeros(len(said)), False)) == " 12"
    with pytest.raises(UserError, match="no chat template; give the RL experiment a `prompt`"):
        ProblemTexts(tokenizer, ROLLOUTS, 512).read(problem_file(tmp_path))
