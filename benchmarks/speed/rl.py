"""A step of RL (sampling, grading, learning) by this project and by TRL's GRPOTrainer, each in its own process."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.speed.sweep import execution, finish, lorabench, start
from benchmarks.speed.table import Row, say
from lorabench.config.margins import DEFAULT_MARGINS

WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    """The RL runs that are trained; the problems are those of the preset `laptop`."""

    problems: int = 40
    group_size: int = 16
    max_new_tokens: int = 4
    rank: int = 8
    lr: float = 6e-4
    steps: int = 12
    threads: int = 2

    @property
    def case(self) -> str:
        """The description of the case in the table."""
        return f"gcd, {self.problems} problems x {self.group_size}, {self.max_new_tokens} tokens, LoRA r{self.rank}"


ARMS = {"rl-lorabench": "lorabench", "rl-trl": "TRL's GRPOTrainer"}
"""The name of each arm in the table, by its name on the command line."""


def preset(shape: Shape) -> dict[str, Any]:
    """Return the preset of the run."""
    sizes = {"tasks": ["gcd"], "max_value": 50, "train": 600, "validation": 1, "test": 1}
    return {
        "description": "RL whose speed is measured",
        "models": {"tiny": {"kind": "tiny"}},
        "problems": {"gcd": {"kind": "arithmetic", **sizes}},
        # TRL refuses LoRA on the unembedding.
        "protocol": {"include_unembedding": False},
        "experiments": {
            "rl_arithmetic": [
                {
                    "models": ["tiny"],
                    "problems": ["gcd"],
                    "ranks": {"all": [shape.rank]},
                    "problems_per_step": shape.problems,
                    "group_size": shape.group_size,
                    "steps": shape.steps,
                    "max_new_tokens": shape.max_new_tokens,
                    "mean_response_tokens": 2,
                    "evaluations": 1,
                    "lrs": {"fullft": [], "lora": [shape.lr]},
                    "seeds": 1,
                }
            ]
        },
        "margins": DEFAULT_MARGINS.model_dump(),
        "execution": execution(shape.threads),
    }


def measure(shape: Shape, chosen: list[str]) -> list[Row]:
    """Measure the chosen arms; return a row for each with the median seconds of its steps after `WARM_UP`."""
    rows = []
    for name in chosen:
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            path, settings, result = (folder / file for file in ("speed.yaml", "settings.json", "result.json"))
            path.write_text(yaml.safe_dump(preset(shape)))
            finish(start(lorabench("step", "dataset", "gcd", path), folder, shape.threads))
            trainer = "trl" if name == "rl-trl" else "lorabench"
            settings.write_text(json.dumps({"trainer": trainer, "preset": str(path), "result": str(result)}))
            command = [sys.executable, "-m", "benchmarks.speed.rl_step", str(settings)]
            finish(start(command, folder, shape.threads))
            measured = json.loads(result.read_text())
        seconds = statistics.median(measured["seconds"][WARM_UP:])
        reward = statistics.mean(measured["rewards"][WARM_UP:])
        say(f"rl: {ARMS[name]}: {seconds:.2f} s a step")
        rows.append(Row("rl", shape.case, ARMS[name], shape.threads, 1, seconds, reward=reward))
    return rows
