"""The program that tests of several processes run in each process: `torchrun ... -m tests.training.several DATA OUT`.

It trains each case and writes, for each case and process, the curve and results as JSON, and checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import ModelSpec, PathModel, TinyModel
from lorabench.models.base import load_model
from lorabench.training.distributed import SINGLE_PROCESS, Processes, join, leave, local_part

from .conftest import TINY, condition_of, splits_of, train


@dataclass(frozen=True)
class Case:
    """A run. With `breaks_after` it is interrupted after that step and goes on from its checkpoint."""

    method: str
    rank: int | None = None
    base: str = "llama-128"
    batch_size: int = 4
    steps: int = 6
    lr: float = 3e-3
    precision: str = "fp32"
    breaks_after: int | None = None
    recompute: bool = False


MOE = "moe-128"
CASES = {
    "fullft": Case("fullft", breaks_after=4),
    "lora": Case("lora", 4, breaks_after=4),
    # With rank 1 one process has all of A and the other none.
    "rank-1": Case("lora", 1, breaks_after=4),
    # One process has two sequences and the other has one, so that the latter computes a part without any sequence.
    "odd-batch": Case("fullft", batch_size=3),
    "moe-lora": Case("lora", 4, base=MOE),
    "moe-fullft": Case("fullft", base=MOE),
    # The unembedding shares the embedding's weights, as in small Llama models.
    "tied-fullft": Case("fullft", base="tied"),
    "tied-lora": Case("lora", 4, base="tied"),
    "bf16-fullft": Case("fullft", precision="bf16"),
    "bf16-lora": Case("lora", 4, precision="bf16"),
    "recompute-fullft": Case("fullft", recompute=True),
    "recompute-moe-lora": Case("lora", 4, base=MOE, recompute=True),
    "diverges": Case("fullft", lr=1e3),
}


class BrokenError(Exception):
    """Interrupts a run."""


def write_tied(folder: Path) -> None:
    """Write a base whose unembedding shares the embedding's weights."""
    model = load_model(TINY)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    model.save_pretrained(folder)


def spec_of(case: Case, folder: Path) -> ModelSpec:
    if case.base == "tied":
        return PathModel(kind="path", path=str(folder / "tied"), parameters=1, hidden_size=1)
    return TinyModel(kind="tiny", name=case.base)


def run_case(
    case: Case, data, folder: Path, checkpoints: Path, processes: Processes = SINGLE_PROCESS, tick=lambda step: None
):
    """Train a case, from the checkpoint in `checkpoints` if there is one, and return its numbers as plain data."""
    condition = condition_of(case.method, case.rank, case.steps, case.batch_size)
    outcome, model = train(
        condition,
        data,
        checkpoints,
        case.lr,
        protocol=Protocol(precision=case.precision, curve_points=3, clip_norm=2.0),
        checkpoint_seconds=0 if case.breaks_after else 1e9,
        tick=tick,
        spec=spec_of(case, folder),
        processes=processes,
        recompute=case.recompute,
    )
    held = sum(local_part(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    curve, losses = ([vars(part) for part in parts] for parts in (outcome.curve, outcome.test_losses))
    numbers = {**vars(outcome), "curve": curve, "test_losses": losses, "held": held}
    return json.loads(json.dumps(numbers))


def break_case(case: Case, data, folder: Path, checkpoints: Path, processes: Processes = SINGLE_PROCESS) -> None:
    """Train a case up to its interruption."""

    def tick(step: int) -> None:
        # The checkpoint of a step is written after its tick.
        if step == case.breaks_after + 1:
            raise BrokenError

    try:
        run_case(case, data, folder, checkpoints, processes, tick)
    except BrokenError:
        return
    raise AssertionError("the run was not interrupted")


def main(data_folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    processes = join()
    data = splits_of(data_folder)
    for name, case in CASES.items():
        results = {"unbroken": run_case(case, data, out, out / name / "unbroken", processes)}
        if case.breaks_after:
            broken, resumed = out / name / "broken", out / name / "resumed"
            break_case(case, data, out, broken, processes)
            if processes.first:
                shutil.copytree(broken, resumed)
            processes.wait()
            results["resumed"] = run_case(case, data, out, resumed, processes)
            # The checkpoint in `alone` was written by a single process.
            results["more"] = run_case(case, data, out, out / name / "alone", processes)
        (out / name / f"{processes.rank}.json").write_text(json.dumps(results))
    leave(processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
