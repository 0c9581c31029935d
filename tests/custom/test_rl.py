"""A preset whose problems are in a user's file trains by reinforcement learning."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from lorabench.config.inputs import ReasoningProblems
from lorabench.data.problems import make_problems, write_problems
from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.collect import collect
from lorabench.store.io import read_table
from lorabench.store.layout import Layout
from lorabench.training.job import run_job


def test_rl_on_problems_of_a_file(tmp_path, monkeypatch, raw_rl_preset):
    monkeypatch.chdir(tmp_path)
    sizes = {"train": 32, "validation": 8, "test": 24}
    problems = make_problems(ReasoningProblems(kind="arithmetic", tasks=["gcd"], max_value=50, **sizes))
    lines = [json.dumps({"q": row["question"], "a": int(row["answer"])}) for row in problems]
    Path("mine.jsonl").write_text("\n".join(lines))
    own = {"kind": "file", "path": "mine.jsonl", "question": "q", "answer": "a", "grader": "number"}
    raw_rl_preset["problems"] = {"mine": own | sizes}
    [block] = raw_rl_preset["experiments"]["rl_arithmetic"]
    block |= {"problems": ["mine"], "held_out": [], "ranks": {}, "seeds": 1}
    block["lrs"]["lora"] = []
    Path("own.yaml").write_text(yaml.safe_dump(raw_rl_preset))
    layout = Layout.of("own.yaml")
    write_problems(make_problems(layout.preset.problems["mine"]), layout.dataset("mine"))
    plan = make_plan(layout.preset)
    [sweep] = plan.sweeps
    run_job(plan, Job((sweep,)), layout, lambda line: None)
    collect([layout.job(Job((sweep,)))], layout.tables())
    runs = read_table(layout.tables(), "runs")
    # The base solves about one problem in four, which shows that it is graded by the file's answers.
    assert 0 < runs["base_reward"].item() < 1
    assert runs["status"].item() == "done"
