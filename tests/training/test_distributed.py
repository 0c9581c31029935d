"""Two processes give the losses, gradient norms, measures and results of one, also after an interruption.

This module is also the program that runs in each process: `torchrun ... -m tests.training.test_distributed DATA OUT`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import ModelSpec, PathModel, TinyModel
from lorabench.training.distributed import SINGLE_PROCESS, Processes, join, leave, local_part
from lorabench.training.loss import MAX_LOGITS

from ..conftest import REPOSITORY
from .conftest import BrokenError, condition_of, splits_of, train, write_tied

pytestmark = pytest.mark.slow


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
    keeping: int | None = None
    max_logits: int = MAX_LOGITS["cpu"]


MOE = "moe-128"
CASES = {
    "fullft": Case("fullft", breaks_after=4),
    "lora": Case("lora", 4, breaks_after=4),
    # With rank 1 one process has all of A and the other none.
    "rank-1": Case("lora", 1, breaks_after=4),
    # One process has two sequences and the other has one, so that the latter computes a part without any sequence.
    "odd-batch": Case("fullft", batch_size=3),
    "recompute-moe-lora": Case("lora", 4, base=MOE, keeping=0),
    "moe-fullft": Case("fullft", base=MOE),
    # The unembedding shares the embedding's weights, as in small Llama models.
    "tied-fullft": Case("fullft", base="tied"),
    "bf16-fullft": Case("fullft", precision="bf16"),
    "bf16-lora": Case("lora", 4, precision="bf16"),
    # The logits of 16 tokens at once; the processes have different numbers of pieces.
    "pieces-fullft": Case("fullft", max_logits=1 << 14, keeping=1),
    "pieces-tied-lora": Case("lora", 4, base="tied", max_logits=1 << 14, keeping=0),
    "diverges": Case("fullft", lr=1e3),
}


def spec_of(case: Case, folder: Path) -> ModelSpec:
    if case.base == "tied":
        return PathModel(kind="path", path=str(folder / "tied"), parameters=1, hidden_size=1)
    return TinyModel(kind="tiny", name=case.base)


def run_case(
    case: Case, data, folder: Path, checkpoints: Path, processes: Processes = SINGLE_PROCESS, tick=lambda step: None
):
    """Train a case, from the checkpoint in `checkpoints` if there is one, and return its numbers as plain data."""
    condition = condition_of(case.method, case.rank, case.steps, case.batch_size)
    with mock.patch.dict(MAX_LOGITS, cpu=case.max_logits):
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
            keeping=case.keeping,
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
    """Train each case in one of the processes, and write its numbers, and checkpoints, for each case and process."""
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


NUMBERS = ("final_valid_nll", "final_test_nll", "first_epoch_nats")
COUNTS = ("status", "diverged_at", "train_tokens", "test_scored_tokens", "first_epoch_scored_tokens")


@pytest.fixture(scope="module")
def several(tmp_path_factory, data_folder, data):
    """Return the folder of a case that two processes have trained, and the numbers of each process."""
    out = tmp_path_factory.mktemp("several")
    write_tied(out / "tied")
    for name, case in CASES.items():
        (out / name).mkdir()
        if case.breaks_after:
            break_case(case, data, out, out / name / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.training.test_distributed", str(data_folder), str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def results_of(name: str) -> tuple[Path, list[dict]]:
        return out, [json.loads((out / name / f"{rank}.json").read_text()) for rank in (0, 1)]

    return results_of


def curve_of(run) -> dict[tuple, float]:
    return {(point["step"], point["split"], point["metric"]): point["value"] for point in run["curve"]}


def assert_same(run, other, rtol: float) -> None:
    assert [run[name] for name in COUNTS] == [other[name] for name in COUNTS]
    numbers = [[each[name] for name in NUMBERS if each[name] is not None] for each in (run, other)]
    np.testing.assert_allclose(*numbers, rtol=rtol)
    losses = [[example["loss"] for example in each["test_losses"]] for each in (run, other)]
    np.testing.assert_allclose(*losses, rtol=10 * rtol)
    assert curve_of(run).keys() == curve_of(other).keys()
    for place, value in curve_of(run).items():
        if value is None:
            assert curve_of(other)[place] is None
        else:
            assert curve_of(other)[place] == pytest.approx(value, rel=rtol, abs=1e-7), place


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_numbers_of_one(name, several, data, tmp_path):
    out, results = several(name)
    case = CASES[name]
    alone = run_case(case, data, out, tmp_path)
    # In bf16 a gradient is rounded for each part of a batch, and the parts differ; the loss before an update does not.
    assert_same(results[0]["unbroken"], alone, rtol=2e-2 if case.precision == "bf16" else 5e-5)
    first_loss = 1, "train", "nll"
    assert curve_of(results[0]["unbroken"])[first_loss] == pytest.approx(curve_of(alone)[first_loss], rel=1e-6)
    assert alone["status"] == ("diverged" if name == "diverges" else "done")
    # Every process has the same numbers to the last bit, so that all take the same decisions.
    first, second = ({**process["unbroken"], "wall_s": 0, "held": 0} for process in results)
    assert first == second
    held = [process["unbroken"]["held"] for process in results]
    assert held == pytest.approx([0.5, 0.5], abs=0.05)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.breaks_after])
def test_a_broken_run_goes_on_in_as_many_processes_in_fewer_and_in_more(name, several, data):
    out, (first, _) = several(name)
    case = CASES[name]
    assert {**first["resumed"], "wall_s": 0} == {**first["unbroken"], "wall_s": 0}
    checkpoints = out / name / "broken"
    files = sorted(path.name for path in checkpoints.iterdir())
    part = f"checkpoint.{case.breaks_after}.1-of-2.safetensors"
    assert files == [part, "checkpoint.safetensors"]
    # A part of a later step whose other parts were never written is ignored.
    (checkpoints / f"checkpoint.{case.breaks_after + 1}.1-of-2.safetensors").write_bytes(b"half")
    fewer = run_case(case, data, out, checkpoints)
    assert_same(fewer, first["unbroken"], rtol=5e-5)
    assert_same(first["more"], first["unbroken"], rtol=5e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
