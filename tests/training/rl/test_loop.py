"""The RL loop is on-policy, changes the policy, can be resumed, and changes nothing without differing rewards."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.runs import Run
from lorabench.training.rl import loop
from lorabench.training.rl.loop import ProblemTexts, evaluation_steps
from lorabench.training.rl.sampler import Request, Response

from ..conftest import BrokenError
from .conftest import ROLLOUTS, TINY, condition_of, drawn, environment_of, problem_file, same_tokens, train


def weights_hash(model) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name:
            digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def metric(outcome, name, split="train"):
    return [point.value for point in outcome.curve if (point.metric, point.split) == (name, split)]


def untimed(outcome):
    """Return the curve without the metrics of speed."""
    return [point for point in outcome.curve if not point.metric.endswith("_per_s")]


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_is_on_policy_and_its_policy_moves(environment, tmp_path, prompts, tokenizer, base, rank):
    run = Run(condition_of(rank, steps=6), 2e-3 if rank else 2e-4, 0)
    outcome, model = train(run, environment, tmp_path)
    assert outcome.status == "done"
    # One update per batch: sampler and learner are the same policy at every step.
    assert metric(outcome, "ratio_max") == pytest.approx([1.0] * 6, abs=1e-4)
    assert metric(outcome, "ratio_mean") == pytest.approx([1.0] * 6, abs=1e-4)
    assert np.abs(metric(outcome, "kl")).max() < 1e-4
    assert metric(outcome, "ratio_above_2") == [0.0] * 6
    if rank:
        assert weights_hash(model) == weights_hash(base), "LoRA leaves the base as it was"
    requests = [Request(prompt, (0, 0, n, s)) for n, prompt in enumerate(prompts[:10]) for s in range(4)]
    assert not same_tokens(drawn(model, tokenizer, requests), drawn(base, tokenizer, requests))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for name in ("reward", "response_length", "truncated", "equal_groups", "reflection", "entropy", "grad_norm"):
        values = metric(outcome, name)
        assert len(values) == 6
        assert all(math.isfinite(value) for value in values)
    assert all(value > 0 for name in ("sample_tokens_per_s", "learn_tokens_per_s") for value in metric(outcome, name))
    assert outcome.final_reward == metric(outcome, "accuracy", "test")[-1]
    assert outcome.final_reward == 1 - np.mean([problem.loss for problem in outcome.test_losses])
    assert outcome.final_valid_reward == metric(outcome, "accuracy", "validation")[-1]
    assert outcome.base_reward == metric(outcome, "accuracy", "test")[0]
    validation, test = (metric(outcome, "accuracy", split)[1:] for split in ("validation", "test"))
    assert outcome.best_reward == test[np.argmax(validation)]


def test_equal_rewards_change_nothing(environment, tmp_path, base):
    """This holds after steps with differing rewards too: Adam's momentum must not move the policy."""

    def grade_until(steps):
        """Return a grading that is right for some training steps (batches of 32) and then accepts all responses."""
        batches, grade = iter(range(1, 100)), environment.grade
        return lambda responses, answers: (
            grade(responses, answers) if len(responses) != 32 or next(batches) <= steps else np.ones(len(responses))
        )

    rights = replace(environment, grade=lambda responses, answers: np.ones(len(responses)))
    outcome, model = train(Run(condition_of(None), 1e-3, 0), rights, tmp_path)
    assert outcome.status == "done"
    assert metric(outcome, "equal_groups") == [1.0] * 4
    assert metric(outcome, "grad_norm") == [0.0] * 4
    assert weights_hash(model) == weights_hash(base)

    # The last of three steps has equal rewards, so the policy is the one after two steps.
    after = []
    for steps, grade in ((2, environment.grade), (3, grade_until(2))):
        _, model = train(Run(condition_of(None, steps), 1e-3, 0), replace(environment, grade=grade), tmp_path)
        after.append(weights_hash(model))
    assert after[0] == after[1] != weights_hash(base)


def test_a_sampler_that_differs_from_the_learner_is_warned_about_once(environment, tmp_path, caplog):
    run = Run(condition_of(None, steps=4), 1e-4, 0)

    def shifting(draw):
        """Return a sampler whose probabilities are too high, by more from the second step on."""

        def shifted(requests, interruptible):
            # A request of training has the number of its step in its key.
            first = requests[0].key is None or requests[0].key[1] == 1
            shift = np.float32(0.005 if first else 0.034)
            return [Response(r.tokens, r.logprobs + shift, r.truncated) for r in draw(requests, interruptible)]

        return shifted

    def train_until(last):
        def die(step):
            if step == last:
                raise BrokenError

        return train(run, environment, tmp_path, die, sampler=shifting, checkpoint_seconds=0)[0]

    with pytest.raises(BrokenError):
        train_until(3)
    outcome = train_until(None)
    assert metric(outcome, "kl") == pytest.approx([0.005, 0.034, 0.034, 0.034], abs=1e-4)
    [message] = caplog.messages
    assert f"In run {run.run_id}, step 2, " in message
    assert "differs from the learner's by 0.034 nats per token (KL); above 0.01 " in message


def test_a_kl_that_is_not_a_number_is_warned_about(environment, tmp_path, caplog):
    def broken(draw):
        return lambda requests, interruptible: [
            Response(r.tokens, np.full_like(r.logprobs, np.nan), r.truncated) for r in draw(requests, interruptible)
        ]

    run = Run(condition_of(None, steps=2), 1e-4, 0)
    outcome, _ = train(run, environment, tmp_path, sampler=broken)
    assert (outcome.status, outcome.diverged_at) == ("diverged", 1)
    [message] = caplog.messages
    assert "step 1, the sampler's distribution differs from the learner's by nan nats" in message


def test_a_base_without_any_reward_is_stopped(tmp_path, tokenizer, base):
    # The base never gets a sum of four numbers of nine digits right.
    path = problem_file(tmp_path, tasks=["chain_sum"], min_digits=9, max_digits=9, min_terms=4, max_terms=4)
    outcome, model = train(Run(condition_of(None, steps=15), 1e-3, 0), environment_of(path, tokenizer), tmp_path)
    assert outcome.status == "unrewarded"
    assert metric(outcome, "reward") == [0.0] * 3
    assert (outcome.base_reward, outcome.final_valid_reward, outcome.final_reward, outcome.best_reward) == (0,) * 4
    assert weights_hash(model) == weights_hash(base)


def test_a_collapsed_run_is_ended_with_the_results_that_it_would_have(environment, tmp_path, base, monkeypatch):
    """Its policy is frozen in steps without a reward, so that all later evaluations are the one at its end."""

    right_steps = 2

    def collapsing(first=1):
        """Return an environment in which no training response (of batches of 32) is right after some steps."""
        batches, grade = iter(range(first, 100)), environment.grade
        return replace(
            environment,
            grade=lambda responses, answers: (
                grade(responses, answers) * (len(responses) != 32 or next(batches) <= right_steps)
            ),
        )

    run, started = Run(condition_of(None, steps=12), 1e-3, 0), []
    monkeypatch.setattr(loop, "COLLAPSED_STEPS", 100)
    whole, whole_model = train(run, collapsing(), tmp_path / "whole")
    monkeypatch.setattr(loop, "COLLAPSED_STEPS", 4)
    ended, model = train(run, collapsing(), tmp_path / "ended", started.append)
    assert (whole.status, ended.status) == ("done", "collapsed")
    assert started == list(range(1, right_steps + 5))
    assert weights_hash(model) == weights_hash(whole_model) != weights_hash(base)
    for name in ("base_reward", "final_valid_reward", "final_reward", "best_reward", "test_losses"):
        assert getattr(ended, name) == getattr(whole, name), name
    assert ended.train_tokens < whole.train_tokens
    # The curve is the same but for what the remaining steps draw, where the mean of the last steps stands in.
    same = {(point.step, point.split, point.metric): point.value for point in untimed(ended)}
    for point in untimed(whole):
        place = point.step, point.split, point.metric
        if point.step <= right_steps + 4 or point.split != "train" or point.metric == "reward":
            assert same[place] == point.value, place
        elif point.metric in ("response_length", "entropy"):
            last = [same[step, "train", point.metric] for step in range(right_steps + 1, right_steps + 5)]
            assert same[place] == pytest.approx(np.mean(last))
        else:
            assert place not in same or point.metric in ("truncated", "reflection"), place
    assert same.keys() <= {(point.step, point.split, point.metric) for point in whole.curve}

    # A run that is killed within these steps ends in the same way.
    def dying(step):
        if step == right_steps + 2:
            raise BrokenError

    with pytest.raises(BrokenError):
        train(run, collapsing(), tmp_path / "killed", dying, checkpoint_seconds=0)
    resumed, _ = train(run, collapsing(right_steps + 1), tmp_path / "killed")
    assert untimed(resumed) == untimed(ended)
    assert resumed.test_losses == ended.test_losses


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_killed_in_a_step_or_in_an_evaluation_ends_as_an_unbroken_one(environment, tmp_path, rank):
    """In a step there is a checkpoint of the one before; between evaluations there is only that before the last one."""
    run = Run(condition_of(rank, steps=5), 3e-3 if rank else 3e-4, 0)

    def train_until(folder, step=None, evaluation=None, **changes):
        """Return the outcome, and what was drawn for: training or an evaluation."""
        drawn_for = []

        def killing(draw):
            def drawing(requests, interruptible):
                drawn_for.append("evaluation" if interruptible else "training")
                if drawn_for.count("evaluation") == evaluation:
                    raise BrokenError
                return draw(requests, interruptible)

            return drawing

        def die(started):
            if started == step:
                raise BrokenError

        folder.mkdir(exist_ok=True)
        try:
            return train(run, environment, folder, die, sampler=killing, **changes)[0], drawn_for
        except BrokenError:
            return None, drawn_for

    unbroken, whole = train_until(tmp_path / "unbroken")
    in_a_step, in_an_evaluation = tmp_path / "step", tmp_path / "evaluation"
    assert train_until(in_a_step, step=4, checkpoint_seconds=0)[0] is None
    killed, before = train_until(in_an_evaluation, evaluation=1)
    assert killed is None
    for folder in (in_a_step, in_an_evaluation):
        resumed, after = train_until(folder)
        assert untimed(resumed) == untimed(unbroken)
        assert (resumed.final_reward, resumed.best_reward) == (unbroken.final_reward, unbroken.best_reward)
        assert resumed.test_losses == unbroken.test_losses
        assert resumed.train_tokens == unbroken.train_tokens
    # The run resumed last starts with the evaluation, and repeats no step.
    assert after[0] == "evaluation"
    assert before.count("training") + after.count("training") == whole.count("training") == 5


def test_another_seed_draws_other_samples_and_held_out_problems_are_not_trained_on(environment, tmp_path, tokenizer):
    rollouts = replace(ROLLOUTS, held_out=("sums",), held_out_samples=3)
    path = problem_file(tmp_path, tasks=["chain_sum"], max_digits=1)
    sums = ProblemTexts(tokenizer, rollouts, 512).read(path)["test"]
    both = replace(environment, held_out={"sums": (sums, environment.grade)})
    with_sums, _ = train(Run(condition_of(None, rollouts=rollouts), 1e-4, 0), both, tmp_path)
    without, other = (train(Run(condition_of(None), 1e-4, seed), environment, tmp_path)[0] for seed in (0, 1))
    assert metric(with_sums, "n_problems", "sums") == [16] * 3
    assert metric(with_sums, "n_samples", "sums") == [48] * 3
    assert len(metric(with_sums, "accuracy", "sums")) == 3
    assert metric(with_sums, "reward") == metric(without, "reward")
    assert with_sums.final_reward == without.final_reward
    assert metric(without, "response_length") != metric(other, "response_length")
    assert without.base_reward == other.base_reward


def test_evaluations_are_evenly_spaced_and_the_last_is_the_end():
    assert evaluation_steps(40, 4) == {10, 20, 30, 40}
    assert evaluation_steps(7, 3) == {3, 5, 7}
    assert evaluation_steps(2, 6) == {1, 2}


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
