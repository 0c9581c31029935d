"""The shipped presets have the recorded runs, the experiments that claims need, and the costs that docs tell."""

import hashlib
import json
import re
from functools import cache

import pytest

from lorabench.claims.judge import CLAIMS
from lorabench.config.loading import load_preset
from lorabench.planning.costs import per_experiment
from lorabench.planning.plan import make_plan

from ..conftest import REPOSITORY

DIGESTS = REPOSITORY / "tests/workflow/plan_digests.json"


@pytest.fixture(params=["smollm2", "core", "paper"])
def preset(request):
    return load_preset(request.param)


def test_each_claim_has_its_experiment_or_is_among_the_limits(preset):
    chosen = set(preset.experiments.chosen())
    limited = re.findall(r"\b[A-PX]\d+\b", " ".join(preset.limits))
    ranges = re.findall(r"\b([A-PX])(\d+) to [A-PX](\d+)\b", " ".join(preset.limits))
    limited += [f"{letter}{number}" for letter, first, last in ranges for number in range(int(first), int(last) + 1)]
    for claim in CLAIMS:
        assert not claim.experiments or chosen & set(claim.experiments) or claim.id in limited, claim.id


@cache
def costs(name, sampler):
    """Return the plan of a preset with a sampler, and the costs of its experiments."""
    plan = make_plan(load_preset(name).with_execution(sampler=sampler))
    return plan, per_experiment(plan)


@pytest.mark.parametrize(
    ("name", "gpu"), [("smollm2", "A100"), ("first_gpu", "H100"), ("core", "H100"), ("paper", "H200")]
)
def test_the_readme_tells_what_they_cost(name, gpu):
    row = next(line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`"))
    hours = int(re.search(rf"about ([\d,]+) hours of an {gpu}", row)[1].replace(",", ""))
    plan, work = costs(name, load_preset(name).execution.sampler)
    assert plan.preset.execution.gpu.startswith(gpu)
    assert work["total"].gpu_hours == pytest.approx(hours, rel=0.1)


@pytest.mark.parametrize("name", json.loads(DIGESTS.read_text()))
def test_the_runs_of_a_shipped_preset_are_those_recorded(name):
    """Trained runs keep their ids, however a preset is written: the SHA-256 of its sorted run and sweep ids."""
    rows = make_plan(load_preset(name)).rows()
    ids = sorted({row[column] for row in rows for column in ("run_id", "sweep_id") if row[column] is not None})
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest() == json.loads(DIGESTS.read_text())[name]
