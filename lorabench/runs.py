"""What is computed, as types only: conditions, runs, sweeps, jobs and evaluations.

A *run* is a condition with one learning rate (LR) and one seed; its `run_id` is a hash of everything that determines
its result. A *sweep* is all runs of one condition: the LR grid with the first seed, further seeds at LRs that an
experiment names, then seeds at the LR that was best on the validation split. The last have no run_id before that LR
is known. A *job* trains one sweep, or several short ones in one process.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from lorabench.config.placement import Placement
from lorabench.utils.hashing import digest

# Part of every run's identity. Raise it when a change alters what a run computes; tests/test_protocol_version.py fails
# when that may be the case.
PROTOCOL_VERSION = 2

Method = Literal["fullft", "lora"]


@dataclass(frozen=True)
class Rollouts:
    """How an RL run draws its rollouts and is evaluated; `lorabench.config.experiments.RlExperiment` has the fields."""

    group_size: int
    max_new_tokens: int
    evaluations: int
    held_out: tuple[str, ...]
    held_out_samples: int
    prompt: str | None
    stop: tuple[str, ...]
    # For the cost estimate only; it does not affect a run's result.
    mean_response_tokens: int = field(compare=False)


@dataclass(frozen=True)
class Condition:
    """What a run trains: model, data, method and hyperparameters, all but the LR and the seed.

    The names of model and dataset are the preset's; `identity` is a hash of what they stand for. In RL the dataset is
    a problem set, and the batch size counts responses (problems times group size).
    """

    task: Literal["sft", "rl"]
    model: str
    dataset: str
    method: Method
    rank: int | None
    placement: Placement | None
    alpha: float | None
    batch_size: int
    steps: int
    identity: str
    # A's initial scale in units of 1/sqrt(d_in), and B's LR over A's; both are 1 in the paper, and None for FullFT.
    init_a: float | None = None
    lr_ratio: float | None = None
    eps: float = 1e-8
    rollouts: Rollouts | None = None

    @property
    def label(self) -> str:
        """A readable name for files and progress, which is never parsed."""
        method = "fullft" if self.method == "fullft" else f"lora-r{self.rank}-{self.placement}"
        return f"{self.model}-{self.dataset}-{method}-b{self.batch_size}-s{self.steps}"

    @cached_property
    def determining(self) -> dict[str, Any]:
        """The fields that determine a run's result, for `Run.run_id`."""
        condition = {k: v for k, v in asdict(self).items() if k not in {"model", "dataset"}}
        if self.rollouts is None:
            del condition["rollouts"]
        else:
            del condition["rollouts"]["mean_response_tokens"]
        return condition


@dataclass(frozen=True)
class Run:
    """One training run. `lr` is the LR of all weights in FullFT and of A in LoRA; B has `lr` times `lr_ratio`."""

    condition: Condition
    lr: float
    seed: int

    @cached_property
    def run_id(self) -> str:
        """The hash of everything that determines the run's result."""
        return digest({"condition": self.condition.determining, "lr": self.lr, "seed": self.seed})


@dataclass(frozen=True)
class Sweep:
    """The runs of one condition, and the experiments that need them."""

    condition: Condition
    lrs: tuple[float, ...]
    seeds: int
    """Number of seeds at the best LR."""
    experiments: tuple[str, ...] = field(compare=False)
    repeated: tuple[tuple[float, int], ...] = ()
    """LR and seed of each further run that is trained whatever the best LR is."""

    @cached_property
    def sweep_id(self) -> str:
        """The sweep's name for files: its condition's label, and a hash of its runs."""
        return f"{self.condition.label}-{digest([[run.run_id for run in self.grid()], self.seeds], 8)}"

    @property
    def n_runs(self) -> int:
        """The largest possible number of runs; it is less if a seed at the best LR is also in `repeated`."""
        return len(self.lrs) + len(self.repeated) + self.seeds - 1

    def grid(self) -> list[Run]:
        """The runs that are known before training: the LR grid with the first seed, then `repeated`."""
        cells = [*((lr, 0) for lr in self.lrs), *self.repeated]
        return [Run(self.condition, lr, seed) for lr, seed in cells]

    def repeats(self, best_lr: float) -> list[Run]:
        """The runs of the other seeds at the best LR, without any that `repeated` already has."""
        seeds = (seed for seed in range(1, self.seeds) if (best_lr, seed) not in self.repeated)
        return [Run(self.condition, best_lr, seed) for seed in seeds]

    @cached_property
    def run_ids(self) -> frozenset[str]:
        """The run_id of every run that the sweep may have, whichever LR proves the best."""
        return frozenset(run.run_id for run in (*self.grid(), *(run for lr in self.lrs for run in self.repeats(lr))))


@dataclass(frozen=True)
class Job:
    """Sweeps that are trained in one process, one after another; they share model, dataset and experiments."""

    sweeps: tuple[Sweep, ...]

    @cached_property
    def job_id(self) -> str:
        """The job's name for files: that of its sweep where it has only one."""
        first, *others = self.sweeps
        if not others:
            return first.sweep_id
        names = sorted(sweep.sweep_id for sweep in self.sweeps)
        return f"{first.condition.model}-{first.condition.dataset}-{len(names)}-sweeps-{digest(names, 8)}"

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments that need its sweeps."""
        return self.sweeps[0].experiments

    @property
    def n_runs(self) -> int:
        """The largest possible number of runs."""
        return sum(sweep.n_runs for sweep in self.sweeps)


@dataclass(frozen=True)
class EvalJob:
    """An evaluation with lm-eval of a sweep's best run, or of a base model where `sweep` is None."""

    model: str
    sweep: Sweep | None
    identity: str = field(compare=False)
    """Hash of the tasks and of the data that they read."""

    @property
    def eval_id(self) -> str:
        """The evaluation's name for files."""
        return f"{self.sweep.sweep_id if self.sweep else self.model + '-base'}-{self.identity}"
