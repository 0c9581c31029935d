"""The loops of SFT and RL have the losses and the weights of the reference, in fp32."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.models.passes import trained_parameters
from lorabench.models.specs import shipped_folder
from lorabench.runs import Run
from lorabench.training import reference
from lorabench.training.loss import MAX_LOGITS
from lorabench.training.rl import loop

from .conftest import BrokenError, base_of, breaking_at, condition_of, series, train
from .rl import conftest as rl
from .rl.conftest import environment, tokenizer  # noqa: F401

BASE = "llama-128"
STEPS = 6
EPS = 1e-4
"""Adam's epsilon. With a smaller one an update depends on the rounding of gradients that are nearly zero."""


def assert_same_weights(model, expected, atol=1e-6):
    ours, theirs = trained_parameters(model), trained_parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def examples_of(split):
    return [tuple(part.tolist() for part in split.example(index)) for index in range(len(split))]


def test_a_falling_lr(data, tmp_path, monkeypatch):
    """PyTorch's own linear schedule, which is of the LRs of A and B alike, and so are those after an interruption."""

    def falling(model, lr, eps, adam=reference.adam):
        optimizer = adam(model, lr, eps)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        return optimizer

    monkeypatch.setattr(reference, "adam", falling)
    condition = replace(condition_of("lora", 4, STEPS, batch_size=4), eps=EPS)
    settings = {"protocol": Protocol(schedule="linear"), "seed": 1}
    with pytest.raises(BrokenError):
        train(condition, data, tmp_path, 1e-3, checkpoint_seconds=0, tick=breaking_at(5), **settings)
    outcome, model = train(condition, data, tmp_path, 1e-3, **settings)
    losses, expected = reference.train_sft(
        shipped_folder(BASE), examples_of(data["train"]), STEPS, 4, 1e-3, 4, seed=1, eps=EPS
    )
    np.testing.assert_allclose(series(outcome, "nll"), losses, rtol=1e-6)
    assert_same_weights(model, expected)


@pytest.mark.parametrize(
    ("base", "rank", "lr", "logits"),
    [
        ("llama-128", 1, 1e-3, 10_000),
        # This rank is computed with merged weights where there are many tokens.
        ("llama-128", 128, 3e-3, 10_000),
        ("llama-128", None, 3e-4, 16),
        # Biases and grouped heads.
        ("qwen2", 4, 1e-3, 7),
        # Tied and scaled embeddings.
        ("gemma", 4, 1e-3, 40),
        ("moe-128", None, 3e-4, 10_000),
    ],
)
def test_sft(base, rank, lr, logits, data, tmp_path, monkeypatch):
    """The logits of some tokens are computed at once."""
    monkeypatch.setitem(MAX_LOGITS, "cpu", logits * 1024)
    model, another = base_of(base), base_of(base)
    monkeypatch.setattr(reference.AutoModelForCausalLM, "from_pretrained", lambda folder, dtype: another)
    condition = replace(condition_of("fullft" if rank is None else "lora", rank, STEPS, batch_size=4), eps=EPS)
    outcome, model = train(condition, data, tmp_path, lr, seed=1, max_batch_tokens=300, model=model)
    losses, expected = reference.train_sft("", examples_of(data["train"]), STEPS, 4, lr, rank, seed=1, eps=EPS)
    np.testing.assert_allclose(series(outcome, "nll"), losses, rtol=1e-6)
    assert_same_weights(model, expected)
    assert outcome.final_valid_nll < outcome.curve[0].value, "it learns"
    with torch.no_grad():
        test_nll = reference.nll(expected, examples_of(data["test"])).item()
    assert outcome.final_test_nll == pytest.approx(test_nll, rel=1e-6)


@pytest.mark.parametrize(("rank", "lr"), [(2, 1e-3), (None, 3e-4)])
def test_rl(rank, lr, environment, tmp_path, monkeypatch):  # noqa: F811
    """The reference learns from the responses that the loop has drawn."""
    steps, drawn, losses = 3, {}, []

    def recording(draw):
        def record(requests):
            responses = draw(requests)
            for request, response in zip(requests, responses, strict=True):
                if request.key is not None:
                    _, step, problem, _ = request.key
                    drawn.setdefault((step, problem), []).append((response.tokens.tolist(), response.logprobs.tolist()))
            return responses

        return record

    real = loop.backward
    monkeypatch.setattr(loop, "backward", lambda *given: losses.append(real(*given)) or losses[-1])
    condition = replace(rl.condition_of(rank, steps, 32), eps=EPS)
    outcome, model = rl.train(Run(condition, lr, 0), environment, tmp_path, sampler=recording)
    (prompts, answers), texts = zip(*environment.splits["train"], strict=True), environment.texts

    def reward(problem, tokens):
        said = texts.text(rl.Response(np.array(tokens), np.zeros(len(tokens)), False))
        return float(environment.grade([said], [answers[problem]])[0])

    expected, rewards, theirs = reference.train_rl(
        shipped_folder(BASE),
        prompts,
        reward,
        lambda model, step, problem: drawn[step, problem],
        steps,
        condition.batch_size // rl.ROLLOUTS.group_size,
        lr,
        rank,
        eps=EPS,
    )
    # The loss is near zero, since advantages add up to zero and ratios are 1.
    np.testing.assert_allclose([measured.loss for measured in losses], expected, atol=1e-6)
    np.testing.assert_allclose(series(outcome, "reward"), rewards, rtol=1e-12)
    assert max(rewards) > min(rewards)
    assert_same_weights(model, theirs)
