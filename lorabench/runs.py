"""What is computed, as types only: conditions, runs, sweeps, jobs and evaluations.

A *run* is a condition with one learning rate (LR) and one seed; its `run_id` is a hash of everything that determines
its result. A *sweep* is all runs of one condition: the LR grid with the first seed, further seeds at LRs that an
experiment names, then seeds at the LR that was best on the validation split, or with `lrs: auto` further LRs and seeds
at the three around the best. The last have no run_id before those LRs are known; `lorabench.planning.walk` says which
they are. A *job* trains one sweep, or several short ones in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from lorabench.config.fields import SamplerName
from lorabench.config.placement import Placement
from lorabench.utils.files import digest
from lorabench.utils.lattice import Lattice

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
    sampler: SamplerName = "own"

    @property
    def determining(self) -> dict[str, Any]:
        """The fields that determine what is drawn; the sampler is among them unless it is the project's own."""
        free = {"mean_response_tokens"} | ({"sampler"} if self.sampler == "own" else set())
        return {name: value for name, value in asdict(self).items() if name not in free}


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
        condition = {k: v for k, v in asdict(self).items() if k not in {"model", "dataset", "rollouts"}}
        if self.rollouts is not None:
            condition["rollouts"] = self.rollouts.determining
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


EXPECTED_FURTHER_LRS = 1
"""LRs beside its three first that a sweep with `lrs: auto` is expected to train (see docs/performance.md)."""
GOOD = 0.95
"""In RL an LR is good if its accuracy is at least this share of the highest one."""
AROUND = 3
"""Number of LRs around the best that have several seeds in a sweep with `lrs: auto`."""
MAX_KL = 0.01
"""KL(sampler || learner) in nats per token above which a step of RL is warned about. The paper's authors found training
to be stable below it (documentation of Tinker, page on RL hyperparameters, section Monitoring and Run Health)."""


@dataclass(frozen=True)
class Sweep:
    """The runs of one condition, and the experiments that need them."""

    condition: Condition
    lrs: tuple[float, ...]
    """The LRs that are trained first."""
    seeds: int
    """Number of seeds at the best LR."""
    experiments: tuple[str, ...] = field(compare=False)
    repeated: tuple[tuple[float, int], ...] = ()
    """LR and seed of each further run that is trained whatever the best LR is."""
    lattice: Lattice | None = None
    """The lattice on which the sweep walks from `lrs` to the best LR; None for a fixed grid."""
    seeds_around: int = 1
    """With a lattice, the number of seeds at the three LRs around the best one, at most `seeds`."""

    @cached_property
    def sweep_id(self) -> str:
        """The sweep's name for files: its condition's label, and a hash of its runs."""
        walk = [] if self.lattice is None else [asdict(self.lattice), self.seeds_around]
        return f"{self.condition.label}-{digest([[run.run_id for run in self.grid()], self.seeds, *walk], 8)}"

    @property
    def n_runs(self) -> int:
        """The expected number of runs; for a fixed grid it is less if a seed at the best LR is also in `repeated`."""
        return sum(map(len, self.expected_waves()))

    @property
    def most_runs(self) -> int:
        """The largest possible number of runs."""
        if self.lattice is None:
            return self.n_runs
        # Seeds go on to other LRs until the means of those around have settled; the last ones are at one LR.
        around = (len(self.lrs) + self.lattice.further) * self.seeds_around
        return around + self.seeds - self.seeds_around + len(self.repeated)

    def grid(self) -> list[Run]:
        """The runs that are known before training: the first LRs with the first seed, then `repeated`."""
        cells = [*((lr, 0) for lr in self.lrs), *self.repeated]
        return [Run(self.condition, lr, seed) for lr, seed in cells]

    def repeats(self, best_lr: float) -> list[Run]:
        """The runs of the other seeds at an LR, without any that `repeated` already has."""
        seeds = (seed for seed in range(1, self.seeds) if (best_lr, seed) not in self.repeated)
        return [Run(self.condition, best_lr, seed) for seed in seeds]

    def expected_waves(self) -> list[list[Run]]:
        """The runs by the waves in which they are expected to be trained; unknown LRs are NaN.

        The runs of a wave are known when it starts.
        """
        if self.lattice is None:
            return [self.grid(), self.repeats(math.nan)]
        steps = min(EXPECTED_FURTHER_LRS, self.lattice.further)
        walk = [[Run(self.condition, math.nan, 0)] for _ in range(steps)]
        around = [Run(self.condition, math.nan, seed) for seed in range(1, self.seeds_around) for _ in range(AROUND)]
        others = [Run(self.condition, math.nan, seed) for seed in range(self.seeds_around, self.seeds)]
        return [self.grid(), *walk, around, *([others] if others else [])]

    def possible_runs(self) -> Iterator[Run]:
        """Yield every run that the sweep may have, whichever LR proves the best; some may come twice."""
        yield from self.grid()
        lrs = list(self.lrs)
        if self.lattice is not None:
            lrs += self.lattice.reachable(min(lrs), max(lrs))
        for lr in lrs:
            yield Run(self.condition, lr, 0)
            yield from self.repeats(lr)

    @cached_property
    def run_ids(self) -> frozenset[str]:
        """The run_id of every run that the sweep may have, whichever LR proves the best."""
        return frozenset(run.run_id for run in self.possible_runs())


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
        """The expected number of runs."""
        return sum(sweep.n_runs for sweep in self.sweeps)

    @property
    def most_runs(self) -> int:
        """The largest possible number of runs."""
        return sum(sweep.most_runs for sweep in self.sweeps)


@dataclass(frozen=True)
class EvalJob:
    """An evaluation with lm-eval of a sweep's best run, or of a base model where `sweep` is None."""

    model: str
    sweep: Sweep | None
    identity: str = field(compare=False)
    """Hash of the tasks, of the data that they read, and of the sampler unless it is the project's own."""

    @property
    def eval_id(self) -> str:
        """The evaluation's name for files."""
        return f"{self.sweep.sweep_id if self.sweep else self.model + '-base'}-{self.identity}"
