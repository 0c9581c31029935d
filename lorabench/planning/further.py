"""Further work on a plan: more seeds and learning rates (LRs) for some of its sweeps, or larger test splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from pydantic import BaseModel

from lorabench.config.preset import Preset
from lorabench.errors import UserError
from lorabench.planning.plan import Plan, make_plan
from lorabench.runs import AROUND, Sweep


@dataclass(frozen=True)
class More:
    """What a sweep shall have; what it has already is no further work."""

    seeds: int = 1
    """The number of seeds, those that it has included."""
    lrs: frozenset[float] = frozenset()
    seeds_around: int = 1
    """The number of seeds at the best LR and at its two neighbours in the grid."""

    def __or__(self, other: More) -> More:
        """Return what satisfies both."""
        seeds, around = max(self.seeds, other.seeds), max(self.seeds_around, other.seeds_around)
        return More(seeds, self.lrs | other.lrs, around)


def further(plan: Plan, more: Mapping[str, More], test_examples: Mapping[str, int]) -> Plan:
    """Return the plan of the further runs alone.

    Args:
        plan: the plan whose runs exist.
        more: what sweeps shall have, by sweep_id.
        test_examples: the sizes of test splits by dataset or problem set. A larger one makes other data, on which all
            runs are trained again.

    Raises:
        UserError: a dataset's test split has no size that can be chosen.
    """
    larger = {name: size for name, size in test_examples.items() if size > _test_size(plan.preset, name)}
    if not larger:
        return Plan(plan.preset, tuple(extra for s in plan.sweeps if (extra := _extra(s, more.get(s.sweep_id)))))
    wanted = {_without_identity(sweep): more[sweep.sweep_id] for sweep in plan.sweeps if sweep.sweep_id in more}
    raised = make_plan(_with_tests(plan.preset, larger))
    sweeps = []
    for sweep in raised.sweeps:
        extra = _extra(sweep, wanted.get(_without_identity(sweep)))
        if sweep.condition.dataset in larger:
            seeds, lrs = (extra.seeds - 1, extra.lrs) if extra else (0, ())
            around = sweep.seeds_around
            if sweep.lattice is not None and around == sweep.seeds:
                seeds //= AROUND
                around += seeds
            repeated = (*sweep.repeated, *(extra.repeated if extra else ()))
            cells = tuple(sorted({*sweep.lrs, *lrs}))
            total = sweep.seeds + seeds
            sweeps.append(replace(sweep, lrs=cells, seeds=total, seeds_around=around, repeated=repeated))
        elif extra:
            sweeps.append(extra)
    return Plan(raised.preset, tuple(sweeps))


def _extra(sweep: Sweep, more: More | None) -> Sweep | None:
    """Return the runs that a sweep does not have yet, as a sweep of their own; None if there are none."""
    if more is None:
        return None
    lrs = tuple(sorted(lr for lr in more.lrs if all(abs(lr / other - 1) > 0.01 for other in sweep.lrs)))
    repeated: tuple[tuple[float, int], ...] = ()
    neighbours = min(2, len(sweep.lrs) + len(lrs) - 1)
    # The LRs are not known before the grid is trained; for the number of runs it does not matter which they are.
    seeds = max(0, more.seeds - sweep.seeds, more.seeds_around - sweep.seeds) + neighbours * (more.seeds_around - 1)
    if sweep.lattice is not None:
        at_best = max(0, more.seeds - sweep.seeds, more.seeds_around - sweep.seeds)
        # A sweep with all seeds at the three LRs goes on like that.
        around = max(more.seeds if sweep.seeds_around == sweep.seeds else 1, more.seeds_around)
        seeds = at_best + (AROUND - 1) * max(0, around - sweep.seeds_around)
    elif sweep.repeated:
        # Its seeds are at every LR.
        seeds, wanted = 0, max(more.seeds, more.seeds_around)
        there = 1 + max(seed for _, seed in sweep.repeated)
        at = dict.fromkeys(lr for lr, _ in sweep.repeated)
        repeated = tuple((lr, seed) for lr in at for seed in range(there, wanted))
        repeated += tuple((lr, seed) for lr in lrs for seed in range(1, max(there, wanted)))
    if not (lrs or seeds or repeated):
        return None
    return Sweep(sweep.condition, lrs, seeds + 1, sweep.experiments, repeated)


def _without_identity(sweep: Sweep) -> str:
    """Return what names a sweep's condition whatever its data are."""
    return repr({name: value for name, value in asdict(sweep.condition).items() if name != "identity"})


def _test_size(preset: Preset, name: str) -> int:
    spec = preset.sources[name]
    if "test" not in type(spec).model_fields:
        raise UserError(f"the size of the test split of {name!r} follows from its training data and can't be raised")
    return spec.test


def _with_tests(preset: Preset, sizes: Mapping[str, int]) -> Preset:
    def raised(section: Mapping[str, BaseModel]) -> dict[str, BaseModel]:
        return {
            name: spec.model_copy(update={"test": sizes[name]}) if name in sizes else spec
            for name, spec in section.items()
        }

    return preset.model_copy(update={"datasets": raised(preset.datasets), "problems": raised(preset.problems)})
