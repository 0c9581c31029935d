"""Two processes give the losses, gradient norms, measures and results of one, also after an interruption or a signal.

On a CPU they talk by gloo, on GPUs, one each, by NCCL.

This module is also the program that runs in each process: `torchrun ... -m tests.training.test_distributed DATA OUT`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from lorabench.config.experiments import Protocol
from lorabench.config.inputs import PathModel, TinyModel
from lorabench.training.distributed import SINGLE_PROCESS, Processes, join, leave, local_part
from lorabench.training.loss import MAX_LOGITS

from ..conftest import REPOSITORY
from .conftest import (
    CPU,
    BrokenError,
    breaking_at,
    command,
    condition_of,
    needs_gpu,
    splits_of,
    sweep_of,
    train,
    write_tied,
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A run. With `breaks` it is also interrupted, and goes on from its checkpoint."""

    method: str
    rank: int | None = None
    base: str = "llama-128"
    batch_size: int = 4
    lr: float = 3e-3
    precision: str = "fp32"
    breaks: bool = False
    keeping: int | None = None
    max_logits: int = MAX_LOGITS["cpu"]
    on_gpus: bool = False


STEPS = 6
CASES = {
    "fullft": Case("fullft", breaks=True, on_gpus=True),
    # With rank 1 one process has all of A and the other none.
    "rank-1": Case("lora", 1, breaks=True),
    # One process has two sequences and the other has one, so that the latter computes a part without any sequence.
    "odd-batch": Case("fullft", batch_size=3),
    "recompute-moe-lora": Case("lora", 4, base="moe-128", keeping=0),
    # The unembedding shares the embedding's weights, as in small Llama models.
    "tied-fullft": Case("fullft", base="tied"),
    "bf16-lora": Case("lora", 4, precision="bf16", on_gpus=True),
    # The logits of 16 tokens at once; the processes have different numbers of pieces.
    "pieces-fullft": Case("fullft", max_logits=1 << 14, keeping=1, on_gpus=True),
    "pieces-tied-lora": Case("lora", 4, base="tied", max_logits=1 << 14, keeping=0),
    "diverges": Case("fullft", lr=1e3),
}


def run_case(
    case: Case,
    data,
    folder: Path,
    checkpoints: Path,
    processes: Processes = SINGLE_PROCESS,
    breaks_at: int | None = None,
    device: torch.device = CPU,
):
    """Train a case, from the checkpoint in `checkpoints` if there is one, and return its numbers as plain data."""
    if case.base == "tied":
        spec = PathModel(kind="path", path=str(folder / "tied"), parameters=1, hidden_size=1)
    else:
        spec = TinyModel(kind="tiny", name=case.base)
    with mock.patch.dict(MAX_LOGITS, {device.type: case.max_logits}):
        outcome, model = train(
            condition_of(case.method, case.rank, STEPS, case.batch_size),
            data,
            checkpoints,
            case.lr,
            protocol=Protocol(precision=case.precision, curve_points=3, clip_norm=2.0),
            checkpoint_seconds=0 if breaks_at else 1e9,
            tick=breaking_at(breaks_at),
            spec=spec,
            processes=processes,
            keeping=case.keeping,
            device=device,
        )
    held = sum(local_part(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    curve, losses = ([vars(part) for part in parts] for parts in (outcome.curve, outcome.test_losses))
    return json.loads(json.dumps({**vars(outcome), "curve": curve, "test_losses": losses, "held": held, "wall_s": 0}))


def main(data_folder: Path, out: Path) -> None:
    """Train each case in one of the processes, and write its numbers, and checkpoints, for each case and process."""
    torch.set_num_threads(1)
    processes = join()
    data, device = splits_of(data_folder), processes.device
    for name, case in CASES.items():
        if device.type == "cuda" and not case.on_gpus:
            continue
        results = {"unbroken": run_case(case, data, out, out / name / "unbroken", processes, device=device)}
        if case.breaks:
            broken = out / name / "broken"
            with suppress(BrokenError):
                run_case(case, data, out, broken, processes, 5, device)
            if processes.first:
                # A part of a later step whose other parts were never written is ignored.
                (broken / "checkpoint.5.1-of-2.safetensors").write_bytes(b"half")
            processes.wait()
            results["files"] = sorted(path.name for path in broken.iterdir())
            results["resumed"] = run_case(case, data, out, broken, processes, device=device)
        (out / name / f"{processes.rank}.json").write_text(json.dumps(results))
    leave(processes)


@pytest.fixture(scope="module")
def several(device, tmp_path_factory, data_folder):
    """Return the folder in which two processes have trained the cases of a type of device."""
    out = tmp_path_factory.mktemp("several")
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    write_tied(out / "tied")
    for name in CASES:
        (out / name).mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*launcher, "-m", "tests.training.test_distributed", str(data_folder), str(out)]
    done = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return out


def curve_of(run) -> dict[tuple, float]:
    return {(point["step"], point["split"], point["metric"]): point["value"] for point in run["curve"]}


needs_gpus = [
    *needs_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"NCCL needs two GPUs, not {torch.cuda.device_count()}"),
]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *((name, "cpu") for name in CASES),
        *(pytest.param(name, "cuda", marks=needs_gpus) for name, case in CASES.items() if case.on_gpus),
    ],
    scope="module",
)
def test_two_processes_give_the_numbers_of_one(name, device, several, data, tmp_path, caplog):
    case, where = CASES[name], torch.device(device)
    alone = run_case(case, data, several, tmp_path, device=where)
    results = [json.loads((several / name / f"{rank}.json").read_text()) for rank in (0, 1)]
    together = results[0]["unbroken"]
    counts = ("status", "diverged_at", "train_tokens", "test_scored_tokens", "first_epoch_scored_tokens")
    assert [together[count] for count in counts] == [alone[count] for count in counts]
    # In bf16 a gradient is rounded for each part of a batch, and the parts differ; the loss before an update does not.
    rtol = 2e-2 if case.precision == "bf16" else 5e-5
    numbers = ("final_valid_nll", "final_test_nll", "first_epoch_nats")
    np.testing.assert_allclose(*([run[number] or 0.0 for number in numbers] for run in (together, alone)), rtol=rtol)
    losses = ([example["loss"] for example in run["test_losses"]] for run in (together, alone))
    np.testing.assert_allclose(*losses, rtol=10 * rtol)
    ours, theirs = curve_of(together), curve_of(alone)
    assert ours.keys() == theirs.keys()
    for place, value in theirs.items():
        assert ours[place] == (None if value is None else pytest.approx(value, rel=rtol, abs=1e-7)), place
    first_loss = 1, "train", "nll"
    assert ours[first_loss] == pytest.approx(theirs[first_loss], rel=1e-6)
    assert alone["status"] == ("diverged" if name == "diverges" else "done")
    # Every process has the same numbers to the last bit, so that all take the same decisions.
    assert {**together, "held": 0} == {**results[1]["unbroken"], "held": 0}
    assert [process["unbroken"]["held"] for process in results] == pytest.approx([0.5, 0.5], abs=0.05)
    if case.breaks:
        parts = ["checkpoint.4.1-of-2.safetensors", "checkpoint.5.1-of-2.safetensors", "checkpoint.safetensors"]
        assert results[0]["files"] == parts
        assert results[0]["resumed"] == together
        # Another number of processes starts again.
        run_case(case, data, several, several / name / "broken", device=where)
        assert "starts again from step 1: checkpoint " in caplog.text


def test_processes_that_get_a_signal_save_together_and_go_on(ready):
    plan, layout = ready("stopped", {"checkpoint_minutes": 1000, "keep_weights": "all"})
    sweep = sweep_of(plan, "lora")
    process = subprocess.Popen(command(sweep.sweep_id, "--processes", "2"), stderr=subprocess.PIPE, text=True)
    run = sweep.grid()[0]
    while not layout.progress(run).exists():
        assert process.poll() is None, "the sweep ended before it could be interrupted"
        time.sleep(0.002)
    # As Slurm does, to all processes and several times; the launcher passes the signal on as well.
    for _ in range(4):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (*map(int, children), process.pid):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    errors = [line for line in said.splitlines() if line.startswith("lorabench:")]
    assert errors == ["lorabench: stopped by SIGTERM; what was done is kept, the same command goes on from there"]
    assert "Traceback" not in said
    assert len(list(layout.runs.glob("*.partial/checkpoint.*1-of-2.safetensors"))) == 1
    assert not layout.lock(run).exists()
    again = subprocess.run(process.args, capture_output=True, text=True, check=True)
    assert again.stderr.count("goes on after step") == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))


def test_an_error_ends_all_processes_and_is_shown_once(ready):
    plan, layout = ready("broken")
    # Both processes find the error when they read the tokens.
    layout.dataset("instruct").write_bytes(layout.dataset("instruct").read_bytes() + b" ")
    together = command(sweep_of(plan, "lora").sweep_id, "--processes", "2")
    done = subprocess.run(together, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("lorabench:")]
    assert len(errors) == 1
    assert "token cache" in errors[0]
    assert "Traceback" not in done.stderr
