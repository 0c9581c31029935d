"""Sampling against transformers' `model.generate` called per problem, both on the tiny base, in one process.

    python -m benchmarks.sampling

The program prints the tokens per second of both and their ratio, medians of several alternating turns, and appends a
row for each shape to `benchmarks/sampling.csv`.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorabench.config.inputs import ReasoningProblems, TinyModel
from lorabench.data.problems import make_problems
from lorabench.models.base import load_model, load_tokenizer, package_versions
from lorabench.runs import Rollouts
from lorabench.training.rl.loop import ProblemTexts
from lorabench.training.rl.sampler import Request, sample
from lorabench.training.run import machine_state

RESULTS = Path(__file__).with_suffix(".csv")
TURNS = 5
SHAPES = {
    # Problem set, group size, tokens of the longest response.
    "arithmetic": (ReasoningProblems(kind="arithmetic", tasks=["gcd"], train=16, validation=1, test=1), 32, 8),
    "gsm_symbolic": (ReasoningProblems(kind="gsm_symbolic", train=16, validation=1, test=1), 16, 96),
}


def measure(spec: ReasoningProblems, group_size: int, max_new_tokens: int) -> tuple[list[float], list[float]]:
    """Return the tokens per second of each turn by this project's sampler and by `generate` called per problem."""
    tiny = TinyModel(kind="tiny")
    model, tokenizer = load_model(tiny).eval(), load_tokenizer(tiny)
    texts = ProblemTexts(tokenizer, Rollouts(group_size, max_new_tokens, 1, (), 1, None, (), 1), 512)
    prompts = [texts.prompt(row["question"]) for row in make_problems(spec) if row["split"] == "train"]

    def ours(turn: int) -> int:
        keys = [(turn, 0, problem, number) for problem in range(len(prompts)) for number in range(group_size)]
        requests = [Request(prompts[key[2]], key) for key in keys]
        responses = sample(model, tokenizer, requests, texts.stop, 1_000_000)
        return sum(len(response.tokens) for response in responses)

    def theirs(turn: int) -> int:
        torch.manual_seed(turn)
        tokens = 0
        for prompt in prompts:
            ids = torch.tensor([prompt])
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=group_size,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            tokens += int((generated[:, len(prompt) :] != tokenizer.pad_token_id).sum())
        return tokens

    speeds: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 1):
        for speed, run in zip(speeds, (ours, theirs), strict=True):
            started = time.perf_counter()
            tokens = run(turn)
            speed.append(tokens / (time.perf_counter() - started))
    # The first turn warms up.
    return speeds[0][1:], speeds[1][1:]


def main() -> None:
    """Measure each shape and append the results."""
    torch.set_num_threads(1)
    machine, versions = machine_state(torch.device("cpu")), package_versions()
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = ["date", "device", "threads", "python", "torch", "transformers", "shape"]
            writer.writerow([*columns, "tokens_per_s", "generate_tokens_per_s", "ratio"])
        for name, (spec, group_size, longest) in SHAPES.items():
            ours, theirs = measure(spec, group_size, longest)
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            shape = f"{name}: 16 problems x {group_size}, up to {longest} tokens"
            numbers = [round(statistics.median(ours)), round(statistics.median(theirs)), round(ratio, 2)]
            print(f"{shape}: {numbers[0]:,} tokens/s, generate per problem {numbers[1]:,}, ratio {numbers[2]}")
            facts = [machine["device"], machine["threads"], platform.python_version()]
            facts += [versions["torch"], versions["transformers"], shape]
            writer.writerow([f"{datetime.now(UTC):%Y-%m-%d}", *facts, *numbers])


if __name__ == "__main__":
    main()
