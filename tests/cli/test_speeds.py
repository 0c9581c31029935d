"""Whose speed a plan takes: that of finished runs, or of the doctor's record."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.cli.speeds import speed_of_runs
from lorabench.config.loading import load_preset
from lorabench.doctor.record import FOLDER, Check, Record, record_for, write_record
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import run_seconds
from lorabench.utils.gpus import processor

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(device: str, **changes: object) -> Record:
    """Return a record with one check."""
    fields = {
        "date": "2026-11-26T12:00:00+00:00",
        "preset": "core",
        "device": device,
        "gpu": None,
        "host": "node1",
        "seconds": 100.0,
        "git_sha": None,
        "packages": {"torch": "2.13.0"},
        "gflops": 250_000.0,
        "checks": [Check(name="device", status="fail", sentence="b", value=1.5, planned=2.0, unit="GB")],
    }
    return Record.model_validate(fields | changes)


def test_a_plan_takes_the_latest_record_of_its_own_device_as_it_was_written():
    core, smoke = load_preset("core").execution, load_preset("smoke").execution
    write_record(record("NVIDIA A100-SXM4-80GB"))
    write_record(record(processor()))
    assert record_for(core) is None
    assert record_for(smoke).device == processor()
    assert write_record(record(H100)).name == "NVIDIA-H100-80GB-HBM3.json"
    later = record("NVIDIA H100 80GB PCIe", date="2026-11-27T12:00:00+00:00")
    write_record(later)
    assert record_for(core) == later
    assert later.sentence == (
        "measured by lorabench doctor on NVIDIA H100 80GB PCIe on 2026-11-27: 250,000 GFLOP/s in training steps; "
        "1 of its 1 checks failed"
    )


@pytest.mark.parametrize(
    "text", ["{", json.dumps({"results": []}), json.dumps(record(H100).model_dump() | {"version": 1})]
)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(text):
    FOLDER.mkdir(parents=True)
    path = FOLDER / "H100.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} is no record of this version of lorabench doctor; delete it"):
        record_for(load_preset("core").execution)


def plan_of(preset: str):
    result = CliRunner().invoke(app, ["plan", "--preset", preset, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_the_plan_says_whose_speed_it_takes():
    a100 = "NVIDIA A100-SXM4-80GB"
    write_record(record(a100, gflops=None))
    assumed = plan_of("smollm2")
    write_record(record(a100))
    plan = plan_of("smollm2")
    assert plan["flops_per_s"] == 250_000e9 != assumed["flops_per_s"]
    assert [f"measured by lorabench doctor on {a100}" in note for note in plan["notes"]] == [True]


def test_the_speed_of_a_cpu_is_that_of_one_preset():
    """Another preset has another width, precision or number of threads."""
    write_record(record(processor(), preset="smoke", gflops=12.5))
    assert plan_of("smoke")["flops_per_s"] == 12.5e9
    assert plan_of("laptop")["notes"] == []


@pytest.fixture(scope="module")
def smoke():
    return make_plan(load_preset("smoke"))


def table(plan, gflops, device="a CPU"):
    """Runs that took exactly the seconds that the cost model predicts at a speed."""
    preset, rows = plan.preset, []
    for sweep in plan.sweeps:
        seconds = run_seconds(preset, sweep, 0)[0] * preset.execution.gflops / gflops
        rows += [(run_id, "done", device, seconds) for run_id in sweep.run_ids]
    return pd.DataFrame(rows, columns=["run_id", "status", "device", "wall_s"])


def speed_from(plan, runs: pd.DataFrame) -> tuple[float, str]:
    """Return the speed from a table in a named folder."""
    Path("tables").mkdir(exist_ok=True)
    runs.to_csv("tables/runs.csv", index=False)
    return speed_of_runs(plan, [Path("tables")])


def test_calibration_finds_the_speed_and_no_error_where_there_is_none(smoke):
    runs = table(smoke, 12.5)
    gflops, sentence = speed_from(smoke, runs)
    assert gflops == pytest.approx(12.5)
    assert sentence == (
        f"measured on {len(runs)} runs on a CPU: 12.5 GFLOP/s; predicted over measured time, median and range: 1.00 "
        "(1.00 to 1.00)"
    )


def test_calibration_leaves_out_what_tells_nothing(smoke):
    runs = table(smoke, 10.0)
    odd = runs.assign(wall_s=1000.0)
    diverged, elsewhere = odd.iloc[:2].assign(status="diverged"), odd.iloc[2:4].assign(device="other")
    unknown = odd.assign(run_id="x" + odd["run_id"])
    assert speed_from(smoke, pd.concat([diverged, elsewhere, runs.iloc[4:], unknown]))[0] == pytest.approx(10)
    with pytest.raises(UserError, match="no finished run of this preset was made on a CPU"):
        speed_from(smoke, odd.assign(status="diverged"))


def test_tables_are_found_and_must_hold_something(smoke, tmp_path):
    assert speed_of_runs(smoke, []) is None
    folder = tmp_path / "results" / "smoke" / "tables"
    folder.mkdir(parents=True)
    table(smoke, 10.0, "somewhere else").to_csv(folder / "runs.csv", index=False)
    assert speed_of_runs(smoke, []) is None, "another processor's runs are not this machine's"
    assert "runs on somewhere else" in speed_of_runs(smoke, [folder])[1]
    in_bf16 = smoke.preset.model_copy(
        update={"protocol": smoke.preset.protocol.model_copy(update={"precision": "bf16"})}
    )
    with pytest.raises(UserError, match="no finished run of this preset was made on a CPU"):
        speed_of_runs(make_plan(in_bf16), [folder])
    with pytest.raises(UserError, match="no finished run of this preset was made on H100-80GB"):
        speed_of_runs(make_plan(load_preset("core")), [folder])
