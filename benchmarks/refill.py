"""Sampling with refilled rows against sampling in batches, on the tiny base in one process.

    python -m benchmarks.refill

The program prints, for caches that hold a share of the requests, the passes through the model and the seconds of
refilled rows as shares of those of batches, medians of several alternating turns. Responses are from 1 to 66 tokens
long. Only a GPU refills rows in training (see `lorabench/training/rl/trainer.py`), where a pass takes about as long for
few rows as for many; on a CPU it takes less for few.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from lorabench.config.datasets import ReasoningProblems
from lorabench.config.models import TinyModel
from lorabench.data.problems import make_problems
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lanes.shelf import single_lane
from lorabench.runs import Rollouts
from lorabench.training.rl.prompts import ProblemTexts
from lorabench.training.rl.refill import sample_refilling
from lorabench.training.rl.sampler import Request, Stop, sample

TURNS = 3
SAMPLERS: dict[str, Callable[..., Any]] = {"batches": sample, "refilled": sample_refilling}


def main() -> None:
    """Measure and print."""
    tiny = TinyModel(kind="tiny")
    model, tokenizer = load_model(tiny).eval(), load_tokenizer(tiny)
    texts = ProblemTexts(tokenizer, Rollouts(1, 66, 1, (), 1, None, (), 1), 512)
    spec = ReasoningProblems(kind="arithmetic", tasks=["gcd"], train=32, validation=1, test=1)
    prompts = [texts.prompt(row["question"]) for row in make_problems(spec) if row["split"] == "train"]
    requests = [Request(prompt, (0, 0, number, again)) for number, prompt in enumerate(prompts) for again in range(16)]
    # Without its end token the base goes on until this word.
    stop = Stop((1,), 66, ("the",))
    passes = [0]
    model.register_forward_pre_hook(lambda *given, **named: passes.__setitem__(0, passes[0] + 1), with_kwargs=True)
    whole = len(requests) * (max(map(len, prompts)) + stop.max_new_tokens)
    for share in (1, 2, 4, 8):
        seconds: dict[str, list[float]] = {name: [] for name in SAMPLERS}
        counted = {}
        for _ in range(TURNS + 1):
            for name, sampler in SAMPLERS.items():
                passes[0], started = 0, time.perf_counter()
                responses = sampler(single_lane(model, ""), tokenizer, requests, stop, whole // share)
                seconds[name].append(time.perf_counter() - started)
                counted[name] = passes[0]
        tokens = [len(response.tokens) for response in responses]
        # The first turn warms up.
        batches, refilled = (statistics.median(seconds[name][1:]) for name in SAMPLERS)
        print(
            f"1/{share} of {len(requests)} requests at a time, {statistics.mean(tokens):.0f} of 66 tokens: "
            f"passes {counted['refilled']}/{counted['batches']} = {counted['refilled'] / counted['batches']:.2f}, "
            f"seconds {refilled:.2f}/{batches:.2f} = {refilled / batches:.2f}"
        )


if __name__ == "__main__":
    main()
