"""Whose speed a plan takes: that of the doctor's record, or of a few steps, which are measured once for a processor."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from lorabench.cli import app
from lorabench.config.loading import load_preset
from lorabench.doctor import bench
from lorabench.doctor.record import Check, Record, read_record, record_for, record_path, write_record
from lorabench.doctor.speeds import read_speed
from lorabench.errors import UserError
from lorabench.models.specs import dimensions
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
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


def test_a_record_is_read_as_it_was_written():
    written = record(H100)
    path = write_record(written)
    assert path.name == "NVIDIA-H100-80GB-HBM3.json"
    assert read_record(path) == written
    assert written.failed == written.checks
    assert written.sentence == (
        "measured by lorabench doctor on NVIDIA H100 80GB HBM3 on 2026-11-26: 250,000 GFLOP/s in training steps; "
        "1 of its 1 checks failed"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Invalid JSON"),
        ('{"results": []}', "date: Field required"),
        (json.dumps(record(H100).model_dump() | {"version": 1}), "version: Input should be 2"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(text, reason):
    path = record_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError) as error:
        record_for(load_preset("core").execution)
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_device_is_refused():
    write_record(record(H100)).rename(record_path("NVIDIA H200"))
    with pytest.raises(UserError, match=f"is of another device, '{H100}', than its name says"):
        record_for(load_preset("core").execution)


def test_a_plan_takes_the_latest_record_of_its_own_device():
    core, smoke = load_preset("core").execution, load_preset("smoke").execution
    write_record(record("NVIDIA A100-SXM4-80GB"))
    write_record(record(processor()))
    assert record_for(core) is None
    assert record_for(smoke).device == processor()
    write_record(record(H100))
    later = record("NVIDIA H100 80GB PCIe", date="2026-11-27T12:00:00+00:00")
    write_record(later)
    assert record_for(core) == later


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


@pytest.fixture
def bf16_preset(raw_preset, write_preset) -> str:
    return str(write_preset(raw_preset | {"protocol": {"precision": "bf16"}}))


def test_a_plan_in_bf16_measures_the_speed_once(bf16_preset, monkeypatch):
    first = plan_of(bf16_preset)
    path = Layout.of(bf16_preset).speed
    speed = read_speed(path, threads=1)
    assert speed.bf16_products in ("native", "fp32")
    assert first["flops_per_s"] == pytest.approx(speed.gflops * 1e9)
    assert first["notes"] == [speed.sentence]

    def again(*arguments):
        raise AssertionError("the speed is measured again")

    monkeypatch.setattr(bench, "measure_speed", again)
    assert plan_of(bf16_preset) == first
    # That of another processor or number of threads, and a damaged file, say nothing.
    assert read_speed(path, threads=2) is None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "another"}))
    assert read_speed(path, threads=1) is None
    path.write_text("damaged")
    assert read_speed(path, threads=1) is None


@pytest.mark.parametrize("preset", ["laptop", "overnight"])
def test_a_slice_has_the_models_width_and_each_kind_of_work_its_share(preset):
    plan = make_plan(load_preset(preset))
    subject = bench.slice_of(plan)
    whole = dimensions(plan.preset.models[subject.condition.model])
    assert (subject.sizes.hidden, subject.sizes.intermediate) == (whole.hidden, whole.intermediate)
    assert subject.sizes.layers == 2
    share = subject.sizes.vocabulary / subject.sizes.layer_parameters / subject.sizes.layers
    assert share == pytest.approx(whole.vocabulary / whole.layer_parameters / whole.layers, rel=0.01)
    assert subject.rows * subject.length <= 512
