"""Sampling by vLLM against this project's own sampler, on SmolLM2-135M with LoRA, in one process.

    python -m benchmarks.engine

vLLM must be installed (docs/cluster.md). The program prints the tokens per second of both
and their ratio, of a turn after a warming one, and appends a row for each number of responses to
`benchmarks/engine.csv`. The engine's seconds include handing over the adapter.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from lorabench.config.inputs import GgufModel
from lorabench.config.loading import load_preset
from lorabench.models.base import convert_gguf, converted_folder, load_model, load_tokenizer, package_versions
from lorabench.models.lora import add_lora, use_fast_products
from lorabench.models.vllm_support import vllm_version
from lorabench.planning.engine import EngineBatch
from lorabench.training.distributed import SINGLE_PROCESS
from lorabench.training.rl.engine import EngineSettings, PolicyEngine, llm_options
from lorabench.training.rl.sampler import Request, Response, Stop, sample
from lorabench.training.run import machine_state

RESULTS = Path(__file__).with_suffix(".csv")
TURNS, NEW_TOKENS, RANK, ALPHA, THREADS = 1, 16, 16, 32.0, 2
RESPONSES = (8, 64, 256)
SAMPLES = 8


def main() -> None:
    """Measure, print and append to the results."""
    spec = load_preset("smollm2").models["smollm2-135m"]
    assert isinstance(spec, GgufModel)
    folder = converted_folder(spec)
    if not (folder / "model.safetensors").exists():
        convert_gguf(spec)
    torch.set_num_threads(THREADS)
    tokenizer = load_tokenizer(spec)
    model = add_lora(load_model(spec), RANK, "all", ALPHA, True, 0)
    use_fast_products(model)
    stop = Stop((), NEW_TOKENS)
    settings = EngineSettings(llm_options(str(folder), "bfloat16", 256, 1 << 30, RANK, EngineBatch()), None, THREADS)
    with PolicyEngine(SINGLE_PROCESS, Path("results/engine.vllm.log")) as engine:

        def by_engine(requests: list[Request]) -> list[Response]:
            return engine.draw(model, settings, requests, stop)

        def own(requests: list[Request]) -> list[Response]:
            return sample(model, tokenizer, requests, stop, 1_000_000, torch.bfloat16)

        rows = []
        for responses in RESPONSES:
            prompts = [
                tuple(tokenizer(f"Question {number}: what is {number} times 7? Answer:")["input_ids"])
                for number in range(responses // SAMPLES)
            ]
            speeds: dict[str, list[float]] = {"own": [], "vllm": []}
            for turn in range(TURNS + 1):
                requests = [
                    Request(prompt, (turn, problem, number))
                    for problem, prompt in enumerate(prompts)
                    for number in range(SAMPLES)
                ]
                for name, draw in (("own", own), ("vllm", by_engine)):
                    started = time.perf_counter()
                    tokens = sum(len(response.tokens) for response in draw(requests))
                    # The first turn warms up.
                    if turn:
                        speeds[name].append(tokens / (time.perf_counter() - started))
            medians = {name: statistics.median(measured) for name, measured in speeds.items()}
            ratio = medians["vllm"] / medians["own"]
            print(f"{responses} responses: own {medians['own']:.0f}, vLLM {medians['vllm']:.0f} tokens/s, {ratio:.2f}")
            rows.append([responses, NEW_TOKENS, *(round(medians[name]) for name in ("own", "vllm")), round(ratio, 2)])
    machine, versions = machine_state(torch.device("cpu")), package_versions()
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            columns = ["date", "device", "threads", "python", "torch", "transformers", "vllm", "responses"]
            writer.writerow([*columns, "tokens_of_a_response", "own_tokens_per_s", "vllm_tokens_per_s", "ratio"])
        for row in rows:
            facts = [machine["device"], machine["threads"], platform.python_version()]
            facts += [versions["torch"], versions["transformers"], vllm_version()]
            writer.writerow([f"{datetime.now(UTC):%Y-%m-%d}", *facts, *row])


if __name__ == "__main__":
    main()
