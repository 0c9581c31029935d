"""Whose speed a plan takes: that of finished runs, or of the doctor's record."""

import json

import pandas as pd
import pytest

from lorabench.cli.show import measured_speed
from lorabench.config.loading import load_preset
from lorabench.doctor.record import FOLDER, Check, Record, record_for, write_record
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import run_seconds
from lorabench.store.layout import Layout
from lorabench.utils.gpus import processor

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(device: str, **changes: object) -> Record:
    fields = {"preset": "core", "device": device, "gpu": None, "host": "node1", "seconds": 100.0, "git_sha": None}
    check = Check(name="device", status="fail", sentence="b", value=1.5, planned=2.0, unit="GB")
    fields |= {"date": "2026-11-26T12:00:00+00:00", "packages": {}, "gflops": 250_000.0, "checks": [check]}
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
    assert "250,000 GFLOP/s in training steps; 1 of its 1 checks failed" in later.sentence


@pytest.mark.parametrize("text", ["{", json.dumps(record(H100).model_dump() | {"version": 1})])
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(text):
    FOLDER.mkdir(parents=True)
    path = FOLDER / "H100.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^{path} is no record of this version: delete it"):
        record_for(load_preset("core").execution)


def test_finished_runs_on_this_machine_tell_the_speed_and_others_do_not():
    layout = Layout.of("smoke")
    plan = make_plan(layout.preset)
    assert measured_speed(plan, layout) is None
    # Runs that took exactly the seconds that the cost model predicts at a speed.
    rows = []
    for sweep in plan.sweeps:
        seconds = run_seconds(plan.preset, sweep, 0)[0] * plan.preset.execution.gflops / 12.5
        rows += [(run_id, "done", processor(), seconds) for run_id in sweep.run_ids]
    runs = pd.DataFrame(rows, columns=["run_id", "status", "device", "wall_s"])
    odd = runs.assign(wall_s=1000.0)
    diverged, elsewhere = odd.iloc[:2].assign(status="diverged"), odd.iloc[2:4].assign(device="other")
    unknown = odd.assign(run_id="x" + odd["run_id"])
    layout.tables().mkdir(parents=True)

    def speed_from(runs: pd.DataFrame) -> tuple[dict[str, float], str] | None:
        runs.to_csv(layout.tables() / "runs.csv", index=False)
        return measured_speed(plan, layout)

    speed, sentence = speed_from(pd.concat([diverged, elsewhere, runs.iloc[4:], unknown]))
    assert speed == {"gflops": pytest.approx(12.5)}
    assert sentence.startswith(f"measured on {len(runs) - 4} runs on {processor()}: 12.5 GFLOP/s; ")
    assert sentence.endswith("range: 1.00 (1.00 to 1.00)")
    assert speed_from(odd.assign(device="other")) is None


def test_a_gpu_is_measured_against_its_roofline_by_runs_or_by_the_doctor():
    layout = Layout.of("core")
    plan = make_plan(layout.preset)
    write_record(record(H100, gpu="H100-80GB", gpu_time=1.25))
    setting, sentence = measured_speed(plan, layout)
    assert setting == {"gpu_time": 1.25}
    assert "1.25 times the plan's seconds" in sentence
    # Runs that took half as long again for what depends on the speed of the GPU.
    rows = []
    for sweep in plan.sweeps:
        computing, waiting = run_seconds(plan.preset, sweep, plan.gpus[sweep])
        if waiting < computing:
            rows += [(run_id, "done", H100, 1.5 * computing + waiting) for run_id in sweep.run_ids]
    layout.tables().mkdir(parents=True)
    pd.DataFrame(rows, columns=["run_id", "status", "device", "wall_s"]).to_csv(
        layout.tables() / "runs.csv", index=False
    )
    setting, sentence = measured_speed(plan, layout)
    assert setting == {"gpu_time": pytest.approx(1.5)}
    assert f"measured on {len(rows)} runs on {H100}: 1.50 times the seconds by the roofline" in sentence
    slower = make_plan(plan.preset.with_execution(**setting))
    fast, slow = (run_seconds(each.preset, each.sweeps[0], 1)[0] for each in (plan, slower))
    assert slow == pytest.approx(1.5 * fast)
