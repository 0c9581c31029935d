"""The time that each optimization of a training step saves on a CPU, measured with and without it.

    python -m benchmarks.parts

The optimizations are: attention in blocks of queries (`lorabench.models.attention`) instead of PyTorch's kernel;
`MAX_LOGITS` logits at once (`lorabench.training.loss`) instead of a quarter of them; LoRA's thin products transposed to
the order that a CPU computes fast (`lorabench.models.lora`); the last MLP only at scored tokens
(`lorabench.models.passes`). Steps with and without take turns in one process. The program prints the seconds of
both and their ratio, and appends a row for each case to `benchmarks/parts.csv`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import torch

from benchmarks.speed.models import SMOLLM2, is_there
from benchmarks.speed.steps import Method, Setting, median_seconds, training_step
from lorabench.models import attention, lora
from lorabench.models.base import package_versions
from lorabench.training import loss
from lorabench.training.loss import MAX_LOGITS
from lorabench.training.run import machine_state
from lorabench.utils.exhaustion import keep_freed_memory

RESULTS = Path(__file__).with_suffix(".csv")
REPEATS = 7


def by_pytorch() -> AbstractContextManager[object]:
    """Within, attention is computed by PyTorch's kernel."""
    return mock.patch.object(attention, "blocks_pay", return_value=False)


def a_quarter() -> AbstractContextManager[object]:
    """Within, a quarter of `MAX_LOGITS` is computed at once."""
    return mock.patch.dict(MAX_LOGITS, cpu=MAX_LOGITS["cpu"] // 4)


def as_written() -> AbstractContextManager[object]:
    """Within, thin products are computed in the order of their formulas."""
    return mock.patch.object(lora, "_narrow", torch.mm)


def everywhere() -> AbstractContextManager[object]:
    """Within, the last MLP is computed at all tokens."""
    return mock.patch.object(loss, "computing_only", return_value=nullcontext())


WITHOUT = {
    "attention in blocks": by_pytorch,
    "logits at once": a_quarter,
    "thin products": as_written,
    "last MLP where scored": everywhere,
}
CASES: list[tuple[str, Setting, Method]] = [
    ("attention in blocks", Setting(batch=8, length=159), "lora"),
    *(
        ("attention in blocks", Setting(model=SMOLLM2, batch=4, length=length, precision=precision), "lora")
        for length, precision in ((127, "bf16"), (511, "bf16"), (511, "fp32"))
    ),
    *(
        ("logits at once", Setting(model=SMOLLM2, batch=batch, length=127, precision="bf16"), method)
        for batch, method in ((4, "lora"), (16, "lora"), (16, "fullft"))
    ),
    *(("thin products", Setting(rank=rank), "lora") for rank in (1, 4, 8, 16)),
    ("thin products", Setting(model=SMOLLM2, rank=8, batch=4, length=127, precision="bf16"), "lora"),
    ("thin products", Setting(model=SMOLLM2, rank=8, batch=1, length=127), "lora"),
    *(
        ("last MLP where scored", Setting(scored=scored), method)
        for scored, method in ((0.2, "lora"), (0.2, "fullft"), (0.5, "lora"))
    ),
]


def main() -> None:
    """Measure each case whose model is on this machine and append the results."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    keep_freed_memory()
    machine, versions = machine_state(torch.device("cpu")), package_versions()
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["date", "device", "threads", "torch", "part", "case", "seconds", "without", "ratio"])
        for part, setting, method in CASES:
            if not is_there(setting.model):
                print(f"{setting.model} is not here and is left out; `lorabench step convert {setting.model}` gets it")
                continue
            step, _ = training_step(setting, method)
            steps = {"with": step, "without": _within(WITHOUT[part], step)}
            seconds = median_seconds(steps, REPEATS)
            case = f"{method}, {setting.case}"
            numbers = [round(seconds["with"], 4), round(seconds["without"], 4)]
            ratio = round(seconds["with"] / seconds["without"], 3)
            print("{}: {}: {} s, without {} s, ratio {}".format(part, case, *numbers, ratio), flush=True)
            facts = [f"{datetime.now(UTC):%Y-%m-%d}", machine["device"], threads, versions["torch"]]
            writer.writerow([*facts, part, case, *numbers, ratio])


def _within(context: Callable[[], AbstractContextManager[object]], step: Callable[[], None]) -> Callable[[], None]:
    def stepped() -> None:
        with context():
            step()

    return stepped


if __name__ == "__main__":
    main()
