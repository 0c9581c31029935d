"""The cost model is calibrated on the runs that tables hold."""

from __future__ import annotations

from statistics import median

import pandas as pd
import pytest

from lorabench.config.loading import load_preset
from lorabench.doctor.record import speed_of_runs
from lorabench.errors import UserError
from lorabench.planning.memory import sweep_memory
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import run_seconds
from lorabench.planning.speed import calibrate, planned_runs, with_gflops


@pytest.fixture(scope="module")
def smoke():
    return make_plan(load_preset("smoke"))


def table(plan, gflops, device="a CPU"):
    """Runs that took exactly the seconds that the cost model predicts at a speed."""
    rows = []
    for run_id, (preset, sweep) in planned_runs([plan]).items():
        seconds = run_seconds(preset, sweep, 0)[0] * preset.execution.gflops / gflops
        peak = int(sweep_memory(preset, sweep).total + 1e9)
        rows.append((run_id, "done", device, seconds, peak))
    return pd.DataFrame(rows, columns=["run_id", "status", "device", "wall_s", "peak_mem_bytes"])


def rows(frame):
    return frame.to_dict("records")


def test_calibration_finds_the_speed_and_no_error_where_there_is_none(smoke):
    calibration = calibrate(rows(table(smoke, 12.5)), planned_runs([smoke]), "a CPU")
    assert calibration.gflops == pytest.approx(12.5)
    assert calibration.time == pytest.approx([1.0] * len(calibration.time))
    assert 1 / 2.5 < min(calibration.memory) <= max(calibration.memory) < 2.5
    assert with_gflops(smoke.preset, calibration.gflops).execution.gflops == calibration.gflops


def test_calibration_tells_how_far_off_it_is(smoke):
    runs = table(smoke, 10.0)
    runs.loc[0, "wall_s"] *= 4
    calibration = calibrate(rows(runs), planned_runs([smoke]), "a CPU")
    assert min(calibration.time) == pytest.approx(median(calibration.time) / 4)
    assert f"time {median(calibration.time):.2f} ({min(calibration.time):.2f} to" in calibration.sentence


def test_calibration_leaves_out_what_tells_nothing(smoke):
    runs = table(smoke, 10.0)
    odd = runs.assign(wall_s=1000.0)
    mixed = pd.concat([runs, odd.assign(status="diverged"), odd.assign(device="other"), odd.assign(run_id="unknown")])
    assert calibrate(rows(mixed), planned_runs([smoke]), "a CPU").gflops == pytest.approx(10)
    assert calibrate(rows(odd.assign(status="diverged")), planned_runs([smoke]), "a CPU") is None


def test_tables_are_found_and_must_hold_something(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert speed_of_runs(smoke, []) is None
    folder = tmp_path / "results" / "smoke" / "tables"
    folder.mkdir(parents=True)
    table(smoke, 10.0, "somewhere else").to_csv(folder / "runs.csv", index=False)
    assert speed_of_runs(smoke, []) is None, "another processor's runs are not this machine's"
    assert speed_of_runs(smoke, [folder]).device == "somewhere else"
    with pytest.raises(UserError, match="no finished run of this preset was made on H100-80GB"):
        speed_of_runs(make_plan(load_preset("core")), [folder])
