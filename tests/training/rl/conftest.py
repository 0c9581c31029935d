"""Fixtures and functions that train an RL condition of the tiny base on a few arithmetic problems."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import ReasoningProblems, TinyModel
from lorabench.data.grading import Grader
from lorabench.data.problems import make_problems, write_problems
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.runs import Condition, Rollouts, Run
from lorabench.training.checkpoint import Checkpoint
from lorabench.training.rl.loop import Environment, ProblemTexts, RlOutcome, evaluate, train_rl
from lorabench.training.rl.objective import ResponseGroup
from lorabench.training.rl.sampler import Request, Response, Stop, sample
from lorabench.training.run import Machine

TINY = TinyModel(kind="tiny")
ROLLOUTS = Rollouts(4, 8, 2, (), 1, None, (), 3)
CPU = torch.device("cpu")


def machine(**changes) -> Machine:
    return Machine(**{"device": CPU, "max_batch_tokens": 16_384} | changes)


def condition_of(rank=None, steps=4, batch_size=16, rollouts=ROLLOUTS) -> Condition:
    method, placement, alpha = ("fullft", None, None) if rank is None else ("lora", "all", 32.0)
    arm = method, rank, placement, alpha
    return Condition("rl", "tiny", "gcd", *arm, batch_size, steps, identity="test", rollouts=rollouts)


def problem_file(folder: Path, **changes) -> Path:
    sizes = {"train": 24, "validation": 4, "test": 8, "tasks": ["gcd"], "max_value": 50}
    path = folder / "problems.parquet"
    write_problems(make_problems(ReasoningProblems(kind="arithmetic", **sizes | changes)), path)
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="session")
def environment(tmp_path_factory, tokenizer) -> Environment:
    """Greatest common divisors up to 50, of which the base answers about a quarter rightly."""
    texts, grader = ProblemTexts(tokenizer, ROLLOUTS, 512), Grader("arithmetic")
    problems = texts.read(problem_file(tmp_path_factory.mktemp("problems")))
    return Environment(texts, problems, lambda *given: np.array(grader.grade(*given), np.float64), {})


@pytest.fixture
def base():
    """A newly loaded base model."""
    return load_model(TINY)


@pytest.fixture(scope="session")
def prompts(environment) -> list[tuple[int, ...]]:
    return [prompt for prompt, _ in environment.splits["train"]]


def drawn(model, tokenizer, requests, max_new_tokens=8, cache=100_000, **stop) -> list[Response]:
    """Draw responses that are ended by the tokenizer's end token."""
    return sample(model, tokenizer, requests, Stop((tokenizer.eos_token_id,), max_new_tokens, **stop), cache)


@pytest.fixture
def groups(base, tokenizer, prompts):
    """Groups of sampled responses with slightly wrong sampler probabilities; some groups have equal rewards."""
    rng = np.random.default_rng(0)
    groups = []
    for number, prompt in enumerate(prompts[:5]):
        responses = drawn(base, tokenizer, [Request(prompt, (0, 0, number, s)) for s in range(6)])
        shifted = [
            Response(r.tokens, r.logprobs + rng.normal(0, 0.1, len(r.tokens)).astype(np.float32), r.truncated)
            for r in responses
        ]
        groups.append(ResponseGroup.of(prompt, shifted, rng.integers(0, 2, 6).astype(float)))
    return groups


def learned(model, request: Request, response: Response) -> np.ndarray:
    """Return the log-probabilities that a model gives the tokens of a response."""
    ids = torch.tensor([[*request.prompt, *response.tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[0, len(request.prompt) :, None])[:, 0].numpy()


def same_tokens(first: list[Response], second: list[Response]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(np.array_equal(response.tokens, other.tokens) for response, other in pairs)


def train(
    run: Run, environment: Environment, folder: Path, tick=lambda step: None, sampler=lambda draw: draw, **changes
) -> tuple[RlOutcome, torch.nn.Module]:
    """Train a run on a newly loaded model; return the outcome and the trained model.

    `sampler` changes the function that draws responses, and `changes` are fields of the machine.
    """
    model, texts, where = load_model(TINY), environment.texts, machine(**changes)

    def draw(requests: list[Request]) -> list[Response]:
        return sample(model, texts.tokenizer, requests, texts.stop, 100_000)

    scores, _ = evaluate(environment, run.condition.rollouts, 0, 0, draw)
    if run.condition.rank:
        model = add_lora(model, run.condition.rank, "all", 32.0, True, run.seed)
        use_fast_products(model)
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", run.run_id, where.checkpoint_seconds)
    return train_rl(run, model, environment, Protocol(), where, checkpoint, sampler(draw), scores, tick), model
