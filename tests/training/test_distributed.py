"""Two processes give the losses, gradient norms, measures and results of one, also after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ..conftest import REPOSITORY
from .several import CASES, break_case, run_case, write_tied

pytestmark = pytest.mark.slow

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
    command = [*launcher, "-m", "tests.training.several", str(data_folder), str(out)]
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
