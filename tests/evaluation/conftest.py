"""A small preset whose data are made once, and whose sweeps are trained once and evaluated by many tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lorabench.data.problems import make_problems, write_problems
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import write_tokens
from lorabench.evaluation.pretraining import write_pretraining
from lorabench.models.base import load_tokenizer, max_length
from lorabench.planning.plan import Plan, make_plan
from lorabench.runs import EvalJob, Job
from lorabench.store.layout import Layout
from lorabench.training.job import run_job

from ..conftest import MARGINS

TASKS = [
    {"name": "lorabench_worked", "about": "learned", "source": "worked", "chat": True, "limit": 6},
    {"name": "lorabench_worked_bits", "about": "learned", "source": "worked", "chat": True, "limit": 6},
    {"name": "lorabench_instruct_bits", "about": "learned", "source": "instruct", "chat": True},
    {"name": "lorabench_instruct", "about": "learned", "source": "instruct", "chat": True, "limit": 6},
    {"name": "lorabench_arithmetic", "about": "learned", "source": "gcd", "chat": True, "limit": 6},
    {"name": "lorabench_pretraining", "about": "forgotten"},
]
SIZES = {"train": 64, "validation": 8, "test": 12}
BLOCK = {
    "models": ["tiny"],
    "datasets": ["instruct"],
    "ranks": {"all": [4]},
    "batch_sizes": [8],
    "lrs": {"fullft": [3e-4, 1e-3, 3e-3], "lora": [1e-3, 3e-3, 1e-2]},
}
RAW: dict[str, Any] = {
    "description": "evaluation for tests",
    "models": {"tiny": {"kind": "tiny"}, "other": {"kind": "tiny", "name": "llama-64"}},
    "datasets": {
        "instruct": {"kind": "instruct", **SIZES, "max_chars": 240},
        "worked": {"kind": "worked", **SIZES, "max_chars": 300},
    },
    "problems": {"gcd": {"kind": "arithmetic", "tasks": ["gcd"], "max_value": 50, **SIZES}},
    "experiments": {"rank": [BLOCK]},
    "evaluation": {"experiments": ["rank"], "tasks": TASKS, "batch_size": 4, "pretraining_documents": 8},
    "margins": MARGINS,
    "execution": {"gflops": 20.0},
}


class Prepared(NamedTuple):
    """The plan of a preset whose data are made, or whose sweeps are trained as well, in the working directory."""

    plan: Plan
    layout: Layout

    def job(self, method: str | None) -> EvalJob:
        """Return the evaluation job of the base, or of the sweep of a method."""
        jobs = self.plan.evaluations()
        return next(job for job in jobs if (job.sweep.condition.method if job.sweep else None) == method)


@pytest.fixture(scope="package")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    folder, home = tmp_path_factory.mktemp("evaluation"), Path.cwd()
    os.chdir(folder)
    try:
        Path("mine.yaml").write_text(yaml.safe_dump(RAW))
        layout = Layout.of("mine.yaml")
        plan = make_plan(layout.preset)
        for name, spec in plan.preset.datasets.items():
            build_dataset(spec, layout.dataset(name))
        write_problems(make_problems(plan.preset.problems["gcd"]), layout.dataset("gcd"))
        write_pretraining(8, layout.pretraining)
        yield Prepared(plan, layout)
    finally:
        os.chdir(home)


@pytest.fixture(scope="package")
def trained(prepared: Prepared) -> Prepared:
    plan, layout = prepared.plan, prepared.layout
    model = plan.preset.models["tiny"]
    source, target = layout.dataset("instruct"), layout.tokens("tiny", "instruct")
    write_tokens(source, load_tokenizer(model), target, max_length(model))
    for sweep in plan.sweeps:
        run_job(plan, Job((sweep,)), layout, lambda line: None)
    return prepared
