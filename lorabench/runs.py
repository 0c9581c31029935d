"""What is computed: conditions, runs, sweeps with their learning rates (LRs) and seeds, jobs and evaluations.

A *run* is a condition with one LR and one seed, a *sweep* all runs of one condition. A *job* trains one sweep, or
several short ones in one process. No torch is imported.

A sweep is trained in waves; `next_runs` says which runs a wave has, given the validation losses so far. The first wave
is the grid. In a sweep of fixed LRs, the second one is the other seeds at the best LR, see `best_lr`. A sweep with
`lrs: auto` walks on a lattice of LRs:

1. Until the lowest loss has a higher one on both sides, no more than a step of the lattice away, the lattice's next LR
   is trained on each side that lacks one. A run that diverged counts as higher, and a finer LR is tried before it.
   Equal lowest losses must be enclosed together, and in RL all LRs whose reward is good: accuracies on few problems
   are noisy and their peaks flat, so that a reward that is a little lower on both sides encloses nothing.
2. The next seeds, `Seeds.around` with the first, are trained at the three LRs around the lowest loss. If its mean over
   the seeds is lowest at another LR than the middle one, the seeds go on to that LR's neighbours. With `Racing` seeds
   are added one at a time from some number on, and an LR that is surely worse than the best one gets no more.
3. All other seeds are trained at the LR with the lowest mean.

A sweep stops when it has tried the lattice's largest number of LRs. Everything follows from the losses alone, so that a
resumed sweep walks the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from lorabench.config.fields import Method, Placement, SamplerName
from lorabench.utils.files import digest

# Part of every run's identity. Raise it when a change alters what a run computes; tests/test_protocol_version.py fails
# when that may be the case.
PROTOCOL_VERSION = 2


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
        arm = "" if self.method == "fullft" else f"-r{self.rank}-{self.placement}"
        return f"{self.model}-{self.dataset}-{self.method}{arm}-b{self.batch_size}-s{self.steps}"

    @cached_property
    def determining(self) -> dict[str, Any]:
        """The fields that determine a run's result, for `Run.run_id`."""
        unnamed = ["model", "dataset"] + (["rollouts"] if self.rollouts is None else [])
        condition = {name: value for name, value in asdict(self).items() if name not in unnamed}
        if self.rollouts is not None:
            del condition["rollouts"]["mean_response_tokens"]
            # A sampler counts unless it is the project's own.
            if self.rollouts.sampler == "own":
                del condition["rollouts"]["sampler"]
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

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Run:
        """Return the run that the spec of a run's record describes."""
        condition = {field.name: spec[field.name] for field in fields(Condition)}
        rollouts = Rollouts(**condition["rollouts"]) if condition["rollouts"] else None
        return cls(Condition(**condition | {"rollouts": rollouts}), spec["lr"], spec["seed"])


# What a sweep with `lrs: auto` is expected to train (see docs/presets.md): LRs besides its first three, and LRs, the
# best one included, that get a seed for which LRs race.
EXPECTED_FURTHER_LRS, EXPECTED_RACERS = 1, 2
GOOD = 0.95
"""In RL an LR is good if its accuracy is at least this share of the highest one."""
AROUND = 3
"""Number of LRs around the best that have several seeds in a sweep with `lrs: auto`."""
MAX_KL = 0.01
"""KL(sampler || learner) in nats per token above which a step of RL is warned about. The paper's authors found training
to be stable below it (documentation of Tinker, page on RL hyperparameters, section Monitoring and Run Health)."""
TIE = 1e-5
"""The difference, in nats per token or as a share of problems, up to which two measured losses are equal. Accuracies
are counts of problems, so those at two LRs are often equal, and rounding in their means must not choose between them.
"""
# In steps of the lattice: an LR closer to a lattice point counts as that point; neighbours are at most so far apart, as
# an LR that is not on the lattice may be a little further away; half a step next to a diverged run is narrow enough.
_SAME, _REACH, _NARROW = 0.3, 1.33, 0.7


@dataclass(frozen=True)
class Lattice:
    """Learning rates at `per_decade` points per decade, the same for all sweeps with `lrs: auto`.

    Between two neighbours lies one finer LR, which is used where a neighbour diverged.
    """

    per_decade: int
    further: int  # The largest number of LRs that a sweep may try besides those with which it starts.
    scale: float = 1.0  # A factor on all LRs, of an arm whose LR of A is scaled.

    def lr(self, position: float) -> float:
        """Return the LR at a position: whole numbers are points of the lattice, halves lie between them."""
        return float(f"{10 ** (position / self.per_decade):.2e}") * self.scale

    def _position(self, lr: float) -> float:
        return self.per_decade * math.log10(lr / self.scale)

    def around(self, lr: float) -> tuple[float, float, float]:
        """Return the lattice point nearest to an LR, between its two neighbours."""
        nearest = round(self._position(lr * self.scale))
        return self.lr(nearest - 1), self.lr(nearest), self.lr(nearest + 1)

    def next_to(self, lr: float, side: int) -> float:
        """Return the next point of the lattice above an LR (`side` 1) or below it (-1)."""
        return self.lr(side * math.ceil(side * self._position(lr) + _SAME))

    def neighbour(self, lr: float, lrs: Iterable[float], side: int) -> float | None:
        """Return the nearest of some LRs above an LR (`side` 1) or below it (-1); None if none is within a step."""
        within_reach = [other for other in lrs if 0 < side * (self._position(other) - self._position(lr)) <= _REACH]
        return min(within_reach, key=lambda other: side * other, default=None)

    def between(self, lr: float, other: float) -> float | None:
        """Return the finer LR between two neighbours; None if they are less than a step apart."""
        low, high = self._position(lr), self._position(other)
        if abs(high - low) < _NARROW:
            return None
        middle = self.lr(round(low + high) / 2)
        return middle if min(lr, other) < middle < max(lr, other) else None

    def reachable(self, lrs: Sequence[float]) -> list[float]:
        """Return every LR that a walk from ascending LRs may come to."""
        first = math.floor(self._position(lrs[0])) - self.further
        last = math.ceil(self._position(lrs[-1])) + self.further
        return [self.lr(position / 2) for position in range(2 * first, 2 * last + 1)]


@dataclass(frozen=True)
class Racing:
    """When one of the three LRs around the best gets no more seeds: by a one-sided t-test of its losses minus those of
    the best one, paired by seed, with a variance that is pooled over the LRs."""

    level: float  # The share of sweeps in which the test gives up an LR that is no worse.
    least: int  # The number of seeds that all three LRs have, at least 2.


@dataclass(frozen=True)
class Seeds:
    """The seeds of a sweep: consecutive numbers from the first seed on, which every LR has and every count includes."""

    best: int  # Seeds at the best LR.
    around: int = 1  # Seeds at each of the three LRs around the best, at most `best`; 1 in a sweep of fixed LRs.
    given: tuple[tuple[float, int], ...] = ()
    """LRs with the number of seeds that each has whichever LR proves the best, ascending."""
    first: int = 0
    racing: Racing | None = None  # None for a sweep whose three LRs around the best all have the same seeds.

    @property
    def all_have(self) -> int:
        """The number of seeds that all three LRs around the best have; without racing all come at once."""
        return self.around if self.racing is None else min(self.racing.least, self.around)

    def leading(self, number: int) -> range:
        """Return the first seeds, as many as `number`."""
        return range(self.first, self.first + number)


@dataclass(frozen=True)
class Sweep:
    """The runs of one condition, and the experiments that need them."""

    condition: Condition
    lrs: tuple[float, ...]  # The LRs that are trained first, ascending.
    seeds: Seeds
    experiments: tuple[str, ...] = field(compare=False)
    lattice: Lattice | None = None
    """The lattice on which the sweep walks from `lrs` to the best LR; None for a fixed grid."""

    @cached_property
    def sweep_id(self) -> str:
        """The sweep's name for files: its condition's label, and a hash of its runs."""
        walk = [] if self.lattice is None else [asdict(self.lattice), self.seeds.around]
        walk += [asdict(self.seeds.racing)] if self.lattice and self.seeds.racing else []
        return f"{self.condition.label}-{digest([[run.run_id for run in self.grid()], self.seeds.best, *walk], 8)}"

    @property
    def n_runs(self) -> int:
        """The expected number of runs; for a fixed grid it is less if the best LR has several seeds anyway."""
        return sum(self.expected_waves())

    @property
    def most_runs(self) -> int:
        """The largest possible number of runs."""
        if self.lattice is None:
            return self.n_runs
        # Seeds go on to other LRs until the means of those around have settled; the last ones are at one LR.
        around = (len(self.lrs) + self.lattice.further) * self.seeds.around
        return around + self.seeds.best - self.seeds.around + len(self.grid()) - len(self.lrs)

    def grid(self) -> list[Run]:
        """The runs that are known before training: each of the first LRs with the first seed, then other seeds."""
        further = [(lr, seed) for lr, number in self.seeds.given for seed in self.seeds.leading(number)[1:]]
        cells = [*((lr, self.seeds.first) for lr in self.lrs), *further]
        return [Run(self.condition, lr, seed) for lr, seed in cells]

    def expected_seeds(self) -> list[list[int]]:
        """Return the seed of each run that is expected after the grid, by waves; LRs are not known before training."""
        seeds, around = self.seeds.leading(self.seeds.best), self.seeds.around
        if self.lattice is None:
            return [list(seeds[1:])] if len(seeds) > 1 else []
        waves = [[self.seeds.first]] * min(EXPECTED_FURTHER_LRS, self.lattice.further)
        all_have = self.seeds.all_have
        waves.append([seed for seed in seeds[1:all_have] for _ in range(AROUND)])
        waves += [[seed] * EXPECTED_RACERS for seed in seeds[all_have:around]]
        waves.append(list(seeds[around:]))
        return [wave for wave in waves if wave]

    def expected_waves(self) -> list[int]:
        """Return the expected number of runs of each wave; the runs of a wave can be trained at the same time."""
        return [len(self.grid()), *map(len, self.expected_seeds())]

    def possible_runs(self) -> Iterator[Run]:
        """Yield every run that the sweep may have, whichever LR proves the best; some may come twice."""
        yield from self.grid()
        for lr in (*self.lrs, *(self.lattice.reachable(self.lrs) if self.lattice else [])):
            yield from (Run(self.condition, lr, seed) for seed in self.seeds.leading(self.seeds.best))

    @cached_property
    def run_ids(self) -> frozenset[str]:
        """The run_id of every run that the sweep may have."""
        return frozenset(run.run_id for run in self.possible_runs())


@dataclass(frozen=True)
class Job:
    """Sweeps that are trained in one process, one after another; they share model, dataset and experiments."""

    sweeps: tuple[Sweep, ...]

    @cached_property
    def job_id(self) -> str:
        """The job's name for files: that of its sweep where it has only one."""
        names, first = sorted(sweep.sweep_id for sweep in self.sweeps), self.sweeps[0].condition
        return names[0] if len(names) == 1 else f"{first.model}-{first.dataset}-{len(names)}-sweeps-{digest(names, 8)}"

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments that need its sweeps."""
        return self.sweeps[0].experiments

    @property
    def n_runs(self) -> int:
        """The expected number of runs."""
        return sum(sweep.n_runs for sweep in self.sweeps)


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


Losses = Mapping[tuple[float, int], float]
"""The final validation losses of finished runs by LR and seed, see `validation_loss`."""


def validation_loss(record: Mapping[str, Any]) -> float:
    """Return the loss by which a sweep selects its LRs, from a run's record; infinite if the run diverged.

    It is the final validation NLL in nats per token, in RL minus the final validation reward.
    """
    nll, reward = (record["outcome"].get(name) for name in ("final_valid_nll", "final_valid_reward"))
    loss = math.nan if nll is None and reward is None else float(-reward if nll is None else nll)
    return math.inf if math.isnan(loss) else loss


def lowest(losses: Mapping[float, float], tie: float = 0.0) -> float | None:
    """Return the LR with the lowest loss, the lowest LR of those that are equal up to `tie`.

    NaN, and infinity for a run that diverged, do not count; None if no loss is finite.
    """
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    least = min(finite.values(), default=math.nan)
    return min((lr for lr, loss in finite.items() if loss <= least + tie), default=None)


def best_lr(sweep: Sweep, losses: Losses) -> float | None:
    """Return the best LR of a sweep by the validation losses; None if every run diverged.

    In a sweep of fixed LRs it is the LR with the lowest mean loss over the seeds that have all LRs of the first, the
    lowest of equally good ones. With a lattice it is the LR with the lowest mean loss over the seeds that all three LRs
    around it have, the middle of equally good ones.
    """
    if sweep.lattice is not None:
        means = {lr: mean for lr, mean in _means(sweep, losses, sweep.seeds.around).items() if math.isfinite(mean)}
        return _middle_of_lowest(means) if means else None
    lrs = [lr for lr, loss in _means(sweep, losses).items() if math.isfinite(loss)]
    seeds = {seed for _, seed in losses if all(math.isfinite(losses.get((lr, seed), math.inf)) for lr in lrs)}
    return lowest({lr: fmean(losses[lr, seed] for seed in seeds) for lr in lrs})


def next_runs(sweep: Sweep, losses: Losses) -> list[Run]:
    """Return the next wave of a sweep's runs, given the losses of all earlier waves; empty when it is finished."""

    def missing(lrs: Iterable[float], seeds: int) -> list[Run]:
        cells = [(lr, seed) for seed in sweep.seeds.leading(seeds) for lr in lrs]
        return [Run(sweep.condition, lr, seed) for lr, seed in cells if (lr, seed) not in losses]

    grid, lattice = sweep.grid(), sweep.lattice
    if wave := [run for run in grid if (run.lr, run.seed) not in losses]:
        return wave
    if lattice is None:
        best = best_lr(sweep, losses)
        return [] if best is None else missing([best], sweep.seeds.best)
    first, seeds, least = _means(sweep, losses), sweep.seeds, sweep.seeds.all_have
    room = max(0, lattice.further - (len(first) - len(sweep.lrs)))
    started = any(seed != seeds.first for lr, seed in losses.keys() - {(run.lr, run.seed) for run in grid})
    if not started and (unexplored := _unexplored(lattice, first, sweep.condition.task == "rl")[:room]):
        return missing(unexplored, 1)
    if not any(map(math.isfinite, first.values())):
        return []
    for number in range(least, seeds.around + 1):
        # Other experiments may have trained all seeds at some LRs, so that the means already know better.
        means = _means(sweep, losses, number)
        before = first if number == least else _means(sweep, losses, number - 1)
        for scores in [means] if means and started else [before, means or before]:
            centre = _middle_of_lowest(scores)
            around = _around(lattice, first, centre, room)
            # Where the best LR has moved, the new LRs catch up before they are compared.
            racers = [lr for lr in around if not _given_up(sweep, losses, lr, around, centre)]
            if wave := missing(around, least) or missing(racers, number):
                return wave
    return missing([_middle_of_lowest(_means(sweep, losses, seeds.around) or first)], seeds.best)


def finished_losses(sweep: Sweep, loss_of: Callable[[Run], float]) -> dict[tuple[float, int], float]:
    """Return the losses of all runs of a finished sweep, in the order of its waves; `loss_of` returns that of a run."""
    losses: dict[tuple[float, int], float] = {}
    while wave := next_runs(sweep, losses):
        losses |= {(run.lr, run.seed): loss_of(run) for run in wave}
    return losses


def _means(sweep: Sweep, losses: Losses, number: int = 1) -> dict[float, float]:
    """Return the mean losses of a number of first seeds at the LRs that have all of these, ascending."""
    seeds = sweep.seeds.leading(number)
    lrs = sorted({lr for lr, _ in losses if all((lr, seed) in losses for seed in seeds)})
    return {lr: fmean(losses[lr, seed] for seed in seeds) for lr in lrs}


def _given_up(sweep: Sweep, losses: Losses, lr: float, around: Sequence[float], best: float) -> bool:
    """Return whether one of the LRs around the best is surely worse than it, by a t-test on the seeds that it has."""
    racing = sweep.seeds.racing
    seeds = [seed for seed in sweep.seeds.leading(sweep.seeds.around) if {(lr, seed), (best, seed)} <= losses.keys()]
    if racing is None or lr == best or len(seeds) < racing.least:
        return False

    from scipy.special import stdtrit

    cells = {other: [seed for seed in seeds if (other, seed) in losses] for other in around if other != best}
    behind = {other: [losses[other, seed] - losses[best, seed] for seed in own] for other, own in cells.items() if own}
    behind = {other: sample for other, sample in behind.items() if all(map(math.isfinite, sample))}
    if lr not in behind:
        return True
    squares = sum((value - fmean(sample)) ** 2 for sample in behind.values() for value in sample)
    freedom = sum(len(sample) - 1 for sample in behind.values())
    error = math.sqrt(squares / freedom / len(seeds))
    return fmean(behind[lr]) > max(TIE, error * float(stdtrit(freedom, 1 - racing.level)))


def _middle_of_lowest(scores: Mapping[float, float]) -> float:
    """Return the middle of the LRs with the lowest score; where all scores are infinite, the lowest LR."""
    lowest = min(scores.values())
    equal = sorted(lr for lr, score in scores.items() if score == lowest)
    return equal[(len(equal) - 1) // 2 if math.isfinite(lowest) else 0]


def _unexplored(lattice: Lattice, first: Mapping[float, float], is_rl: bool) -> list[float]:
    """Return the LRs to train on the sides on which no higher loss bounds the best; all lower if all diverged."""
    lowest = min(first.values())
    if math.isinf(lowest):
        return [lattice.next_to(min(first), -1)]
    # In RL the losses are minus the rewards.
    enclosed = [lr for lr, loss in first.items() if loss <= (GOOD * lowest if is_rl else lowest)]
    unexplored = []
    for end, side in ((enclosed[0], -1), (enclosed[-1], 1)):
        neighbour = lattice.neighbour(end, first, side)
        if neighbour is None:
            unexplored.append(lattice.next_to(end, side))
        elif math.isinf(first[neighbour]) and (finer := lattice.between(end, neighbour)):
            unexplored.append(finer)
    return unexplored


def _around(lattice: Lattice, first: Mapping[float, float], centre: float, room: int) -> list[float]:
    """Return the three LRs around a centre, ascending, the centre among them.

    Where the runs on one side diverged, the third is a finer LR on the other side. Without room for another LR it is
    the next but one there.
    """
    chosen = [centre]
    for side in (-1, 1):
        neighbour = lattice.neighbour(centre, first, side)
        if neighbour is None and len([lr for lr in chosen if lr not in first]) < room:
            chosen.append(lattice.next_to(centre, side))
        elif neighbour is not None and math.isfinite(first[neighbour]):
            chosen.append(neighbour)
    tried = all(lr in first for lr in chosen)
    if len(chosen) == AROUND - 1 and tried and room and (finer := lattice.between(*chosen)):
        chosen.append(finer)
    others = [lr for lr, loss in first.items() if math.isfinite(loss) and lr not in chosen]
    nearest = sorted(others, key=lambda lr: abs(math.log(lr / centre)))
    return sorted(chosen + nearest[: AROUND - len(chosen)])
