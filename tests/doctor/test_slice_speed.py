"""The speed of a slice of a model: what is measured, and that it is measured once for each processor."""

from __future__ import annotations

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from lorabench.cli import app
from lorabench.config.loading import load_preset
from lorabench.doctor import slice_speed
from lorabench.doctor.record import read_speed
from lorabench.doctor.steps import PEAK_SECONDS, matmul_peak
from lorabench.models.dimensions import dimensions
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bf16_preset(raw_preset, write_preset) -> str:
    return str(write_preset(raw_preset | {"protocol": {"precision": "bf16"}}))


def plan_of(preset: str):
    result = CliRunner().invoke(app, ["plan", "--preset", preset, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_plan_in_bf16_measures_the_speed_once(bf16_preset, monkeypatch):
    first = plan_of(bf16_preset)
    path = Layout.of(bf16_preset).speed
    speed = read_speed(path, threads=1)
    assert speed.bf16_products in ("native", "fp32")
    assert first["flops_per_s"] == pytest.approx(speed.gflops * 1e9)
    assert first["notes"] == [speed.sentence]

    def again(*arguments):
        raise AssertionError("the speed is measured again")

    monkeypatch.setattr(slice_speed, "measure_speed", again)
    assert plan_of(bf16_preset) == first
    # That of another processor or number of threads, and a damaged file, say nothing.
    assert read_speed(path, threads=2) is None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "another"}))
    assert read_speed(path, threads=1) is None
    path.write_text("damaged")
    assert read_speed(path, threads=1) is None


def test_a_plan_in_fp32_takes_the_speed_of_the_preset_until_the_doctor_has_measured_one(raw_preset, write_preset):
    preset = str(write_preset(raw_preset))
    layout = Layout.of(preset)
    assert plan_of(preset)["flops_per_s"] == 20e9
    assert not layout.speed.exists()
    check = slice_speed.check_speed(make_plan(layout.preset), layout)
    assert (check.status, check.planned) == ("measured", 20.0)
    assert plan_of(preset)["flops_per_s"] == pytest.approx(check.value * 1e9)


@pytest.mark.parametrize("preset", ["laptop", "overnight"])
def test_a_slice_has_the_models_width_and_each_kind_of_work_its_share(preset):
    plan = make_plan(load_preset(preset))
    subject = slice_speed.slice_of(plan)
    whole = dimensions(plan.preset.models[subject.condition.model])
    assert (subject.sizes.hidden, subject.sizes.intermediate) == (whole.hidden, whole.intermediate)
    assert subject.sizes.layers == 2
    share = subject.sizes.vocabulary / subject.sizes.layer_parameters / subject.sizes.layers
    assert share == pytest.approx(whole.vocabulary / whole.layer_parameters / whole.layers, rel=0.01)
    assert subject.rows * subject.length <= 512


@pytest.mark.parametrize("gflops", [0.2, 3.0, 500.0])
def test_a_peak_takes_about_a_second_whatever_the_speed(gflops, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class Matrix:
        """A matrix whose product takes as long as on a processor of the given speed."""

        def __init__(self, side):
            self.side = side

        def to(self, dtype):
            return self

        def __matmul__(self, other):
            now[0] += 2 * self.side**3 / gflops / 1e9

    monkeypatch.setattr(torch, "randn", lambda side, *others, **options: Matrix(side))
    assert matmul_peak(torch.bfloat16, CPU) == pytest.approx(gflops * 1e9)
    assert now[0] < 2 * PEAK_SECONDS
