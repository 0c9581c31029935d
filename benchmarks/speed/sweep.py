"""The wall-clock time of a whole sweep, start-up included, against other trainers with a process for each run.

Every arm trains the same runs: one model folder, the same batches of the same tokens in the same order, LoRA with the
same settings and seed, Adam at a constant LR. The losses of all arms must agree.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import yaml
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar

from benchmarks.speed.table import REPOSITORY, Row, say
from lorabench.config.loading import load_preset
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.models.base import load_model, load_tokenizer, model_location
from lorabench.models.lora import targets
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.training.loss import IGNORED
from lorabench.training.run import data_order

# The datasets written here need no progress bars.
disable_progress_bar()

FINETUNE = Path(__file__).with_name("finetune.py")
NAME, MODEL, DATASET = "speed", "llama-128", "instruct"
TOLERANCE = 1e-3
"""Nats per token by which the losses of two arms may differ in a run."""
LAST = 5
"""Number of last steps whose mean loss is the final training loss."""


@dataclass(frozen=True)
class Shape:
    """The runs of the sweep."""

    lrs: tuple[float, ...] = (2e-4, 4e-4, 8e-4, 1.5e-3, 3e-3, 5e-3, 8e-3)
    steps: int = 50
    batch_size: int = 8
    rank: int = 16
    test: int = 64
    threads: int = 2
    turns: int = 3

    @property
    def case(self) -> str:
        """The description of the case in the table."""
        return f"{len(self.lrs)} LRs of LoRA r{self.rank}, {self.steps} steps of {self.batch_size}"


@dataclass(frozen=True)
class Losses:
    """The final losses of a run in nats per scored token."""

    train: float
    test: float


LossesByLr = dict[float, Losses]
"""The losses of the runs by learning rate."""


def preset(shape: Shape) -> dict[str, Any]:
    """Return the preset of the sweep."""
    sizes = {"train": shape.steps * shape.batch_size, "validation": 16, "test": shape.test, "max_chars": 220}
    return {
        "description": "The sweep whose speed is measured",
        "models": {MODEL: {"kind": "tiny", "name": MODEL}},
        "datasets": {DATASET: {"kind": DATASET, **sizes}},
        # Validation is as rare as possible, since the other trainers have none.
        # TRL refuses LoRA on the unembedding.
        "protocol": {"curve_points": 2, "include_unembedding": False},
        "experiments": {
            "rank": [
                {
                    "models": [MODEL],
                    "datasets": [DATASET],
                    "ranks": {"all": [shape.rank]},
                    "batch_sizes": [shape.batch_size],
                    "lrs": {"fullft": [], "lora": list(shape.lrs)},
                    "seeds": 1,
                }
            ]
        },
        "margins": DEFAULT_MARGINS.model_dump(),
        "execution": execution(shape.threads),
    }


def execution(threads: int) -> dict[str, Any]:
    """Return a preset's settings of `execution` for a number of CPU threads."""
    return {"threads": threads, "max_batch_tokens": 4096, "gflops": 50.0}


def lorabench(*arguments: Any) -> list[str]:
    """Return a command of this project; the last argument is the preset."""
    *words, path = map(str, arguments)
    return [sys.executable, "-m", "lorabench.cli", *words, "--preset", path]


def start(command: list[str], folder: Path, threads: int) -> subprocess.Popen[str]:
    """Start a command in a folder, with this checkout's code."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=pipe, stderr=subprocess.STDOUT)


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for processes.

    Raises:
        SystemExit: a process failed; the message has its output.
    """
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(process.args)} failed:\n{output[-3000:]}")  # type: ignore[arg-type]


class Training:
    """The sweep trained by lorabench, in its own folder, with data and tokens prepared in advance."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        folder.mkdir(parents=True)
        self.folder, self.shape = folder, shape
        self.path, self.results = folder / f"{NAME}.yaml", folder / "results" / NAME
        self.path.write_text(yaml.safe_dump(preset(shape)))
        self.plan = make_plan(load_preset(str(self.path)))
        finish(start(lorabench("step", "dataset", DATASET, self.path), folder, shape.threads))
        finish(start(lorabench("step", "tokens", MODEL, DATASET, self.path), folder, shape.threads))

    def clear(self) -> None:
        """Delete all runs."""
        for path in self.results.iterdir():
            if path.name not in ("data", "tokens"):
                shutil.rmtree(path)

    def train(self) -> None:
        """Train all runs."""
        [sweep] = self.plan.sweeps
        finish(start(lorabench("step", "train", sweep.sweep_id, self.path), self.folder, self.shape.threads))

    def losses(self) -> LossesByLr:
        """Return the final losses of the finished runs; the test loss of a run that diverged is NaN."""
        by_lr = {}
        for run in self.plan.sweeps[0].grid():
            folder = RunFolder(self.results / "runs", run.run_id)
            curves = pd.read_parquet(folder.curves)
            train = curves[(curves["split"] == "train") & (curves["metric"] == "nll")].sort_values("step")["value"]
            test = folder.read_record()["outcome"]["final_test_nll"]
            by_lr[run.lr] = Losses(float(train.tail(LAST).mean()), math.nan if test is None else test)
        return by_lr

    def tokens(self) -> dict[Split, TokenizedSplit]:
        """Read the splits that are trained and tested on."""
        layout = Layout(NAME, self.plan.preset)
        [(model, spec)] = self.plan.preset.models.items()
        key = cache_key(load_tokenizer(spec), self.folder / layout.dataset(DATASET))
        return read_tokens(self.folder / layout.tokens(model, DATASET), key)


def rows(split: TokenizedSplit, indices: Iterable[int]) -> dict[str, list[list[int]]]:
    """Return examples in the form that trainers take: labels are the ids of scored tokens, else `IGNORED`."""
    examples = [split.example(index) for index in indices]
    labels = [[int(i) if score else IGNORED for i, score in zip(*example, strict=True)] for example in examples]
    return {"input_ids": [ids.tolist() for ids, _ in examples], "labels": labels}


class OtherTraining:
    """The same runs trained by another trainer, each in its own process, one after another.

    Args:
        trainer: "transformers" or "trl".
        like: the sweep whose runs and tokens are used.
    """

    def __init__(self, folder: Path, shape: Shape, trainer: str, like: Training) -> None:
        folder.mkdir()
        self.folder, self.shape = folder, shape
        data, run, protocol = like.tokens(), like.plan.sweeps[0].grid()[0], like.plan.preset.protocol
        order = data_order(len(data["train"]), shape.steps, shape.batch_size, run.seed).ravel().tolist()
        Dataset.from_dict(rows(data["train"], order)).save_to_disk(folder / "train")
        Dataset.from_dict(rows(data["test"], range(len(data["test"])))).save_to_disk(folder / "test")
        spec, condition = like.plan.preset.models[MODEL], run.condition
        assert condition.placement
        self.settings = {
            "trainer": trainer,
            "model": model_location(spec),
            "train": str(folder / "train"),
            "test": str(folder / "test"),
            "steps": shape.steps,
            "batch_size": shape.batch_size,
            "threads": shape.threads,
            "rank": condition.rank,
            "alpha": condition.alpha,
            "targets": targets(load_model(spec), condition.placement, protocol.include_unembedding)[0],
            "seed": run.seed,
            "betas": protocol.betas,
            "eps": condition.eps,
        }

    def _result(self, lr: float) -> Path:
        return self.folder / f"{lr}.result.json"

    def clear(self) -> None:
        """Delete all runs."""
        for lr in self.shape.lrs:
            self._result(lr).unlink(missing_ok=True)

    def train(self) -> None:
        """Train all runs."""
        for lr in self.shape.lrs:
            path = self.folder / f"{lr}.json"
            path.write_text(json.dumps(self.settings | {"lr": lr, "out": f"{lr}", "result": str(self._result(lr))}))
            finish(start([sys.executable, str(FINETUNE), str(path)], self.folder, self.shape.threads))

    def losses(self) -> LossesByLr:
        """Return the final losses of the finished runs."""
        results = {lr: json.loads(self._result(lr).read_text()) for lr in self.shape.lrs}
        return {lr: Losses(statistics.mean(run["train"][-LAST:]), run["test"]) for lr, run in results.items()}


ARMS = {
    "lorabench": "lorabench",
    "transformers": "Trainer and PEFT, a process per run",
    "trl": "TRL's SFTTrainer, a process per run",
}
"""The name of each arm in the table, by its name on the command line."""


def check_agreement(losses_by_arm: dict[str, LossesByLr], tolerance: float) -> None:
    """Raise SystemExit if losses of a run by two arms differ by more than a tolerance in nats per token, or are NaN."""
    (first, expected), *others = losses_by_arm.items()
    for name, losses in others:
        for lr, own in losses.items():
            for what in ("train", "test"):
                reference, value = getattr(expected[lr], what), getattr(own, what)
                # The comparison is negated so that NaN does not pass.
                if not abs(reference - value) <= tolerance:
                    values = f"{reference:.5f} by {first!r}, {value:.5f} by {name!r}"
                    raise SystemExit(f"the arms did not train the same: {what} loss at lr {lr:g} is {values}")


def measure(shape: Shape, chosen: list[str]) -> list[Row]:
    """Train the sweep by each arm in turns; return a row for each arm with the medians of its turns.

    Raises:
        SystemExit: an arm failed, or the arms did not train the same.
    """
    if not chosen:
        return []
    with TemporaryDirectory() as scratch:
        # The other trainers use the tokens of this project.
        own = Training(Path(scratch) / "lorabench", shape)
        arms: dict[str, Training | OtherTraining] = {
            name: own if name == "lorabench" else OtherTraining(Path(scratch) / name, shape, name, own)
            for name in chosen
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        of_cpu: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(shape.turns):
            for name, arm in arms.items():
                arm.clear()
                started, cpu_before = time.perf_counter(), children_seconds()
                arm.train()
                seconds[name].append(time.perf_counter() - started)
                of_cpu[name].append(children_seconds() - cpu_before)
                say(f"sweep, turn {turn + 1} of {shape.turns}: {ARMS[name]}: {seconds[name][-1]:.1f} s")
            losses = {name: arm.losses() for name, arm in arms.items()}
            check_agreement(losses, TOLERANCE)
    return [
        Row(
            "sweep",
            shape.case,
            ARMS[name],
            shape.threads,
            len(shape.lrs),
            statistics.median(times),
            statistics.median(of_cpu[name]),
            statistics.mean(loss.train for loss in losses[name].values()),
            statistics.mean(loss.test for loss in losses[name].values()),
        )
        for name, times in seconds.items()
    ]


def children_seconds() -> float:
    """Return the CPU seconds of all child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system
