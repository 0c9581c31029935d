"""The file of the doctor: what is refused, and whose speed a plan takes."""

from __future__ import annotations

import json

import pytest

from lorabench.config.loading import load_preset
from lorabench.doctor.record import Check, read_record, record_for, record_path, with_measured_speed, write_record
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.planning.seconds import evaluation_seconds, flops_per_second, run_seconds
from lorabench.utils.gpus import processor

from ..handmade.presets import with_execution
from .conftest import record

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_record_is_read_as_it_was_written():
    written = record(H100, checks=[Check(name="a", status="fail", sentence="b", value=1.5, planned=2.0, unit="GB")])
    path = write_record(written)
    assert path.name == "NVIDIA-H100-80GB-HBM3.json"
    assert read_record(path) == written
    assert written.failed == written.checks


def _changed(**fields):
    return json.dumps(record(H100).model_dump() | fields)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Invalid JSON"),
        ('{"results": []}', "date: Field required"),
        (_changed(version=2), "version: Input should be 1"),
        (_changed(gflops=-1.0), "gflops: Input should be greater than 0"),
        (_changed(checks=[{"name": "a", "status": "fine", "sentence": "b"}]), "checks.0.status"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused_in_one_sentence(text, reason):
    path = record_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    for read in (lambda: read_record(path), lambda: record_for(load_preset("core").execution)):
        with pytest.raises(UserError) as error:
            read()
        assert reason in str(error.value)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_of_another_device_is_refused():
    write_record(record(H100)).rename(record_path("NVIDIA H200"))
    with pytest.raises(UserError, match=f"is of another device, '{H100}', than its name says"):
        record_for(load_preset("core").execution)


def test_a_plan_takes_the_latest_record_of_its_own_device():
    core, smoke = load_preset("core").execution, load_preset("smoke").execution
    assert record_for(core) is None
    write_record(record("NVIDIA A100-SXM4-80GB"))
    write_record(record(processor()))
    assert record_for(core) is None
    assert record_for(smoke).device == processor()
    write_record(record(H100))
    later = record("NVIDIA H100 80GB PCIe", date="2026-11-27T12:00:00+00:00")
    write_record(later)
    assert record_for(core) == later


def test_the_estimates_are_those_of_the_measured_speeds():
    core = with_execution(load_preset("core"), sampler="own")
    rl = next(sweep for sweep in make_plan(core).sweeps if sweep.condition.rollouts)
    fast = with_measured_speed(
        core, record(H100, gflops=flops_per_second(core.execution) / 1e9 * 2, layer_seconds=4e-4)
    )
    (computing, drawing), (half, less) = run_seconds(core, rl, 1), run_seconds(fast, rl, 1)
    assert half == pytest.approx(computing / 2)
    # The layers take half as long as is assumed, and weights and cache are read as fast as before.
    assert drawing / 2 < less < drawing
    job = make_plan(core).evaluations()[0]
    assert evaluation_seconds(fast, job) < evaluation_seconds(core, job)
    unknown = with_measured_speed(core, record(H100, gflops=None, layer_seconds=None))
    assert unknown == core
    # The doctor times this project's own sampler, which says nothing about the engine.
    vllm = with_execution(core, sampler="vllm")
    assert with_measured_speed(vllm, record(H100, gflops=None, layer_seconds=4e-4)) == vllm


def test_a_record_says_what_is_taken_from_it():
    found = record(H100, checks=[Check(name="a", status="fail", sentence="b")])
    assert found.sentence(with_speed=True, with_drawing=True) == (
        "measured by lorabench doctor on NVIDIA H100 80GB HBM3 on 2026-11-26: 250,000 GFLOP/s in training steps, "
        "0.200 ms for a layer and token in drawing responses; 1 of its 1 checks failed"
    )
    assert "GFLOP/s" not in found.sentence(with_speed=False, with_drawing=True)
    assert "drawing" not in found.sentence(with_speed=True, with_drawing=False)
    assert record(H100, layer_seconds=None).sentence(with_speed=False, with_drawing=True) is None


def test_the_plan_says_whose_speed_it_takes():
    from typer.testing import CliRunner

    from lorabench.cli import app

    a100 = "NVIDIA A100-SXM4-80GB"
    write_record(record(a100))
    command = ["plan", "--preset", "smollm2", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["flops_per_s"] == 250_000e9
    assert any(f"measured by lorabench doctor on {a100}" in note for note in told["notes"])
    record_path(a100).write_text("damaged")
    broken = CliRunner().invoke(app, command)
    assert broken.exit_code == 2
    assert broken.stderr.startswith("lorabench: results/doctor/NVIDIA-A100-SXM4-80GB.json is no record")
