"""A preset within a budget: what is left out, in an order that is always the same.

`NAME@HOURS` in place of a preset's name (`paper@500`; Snakemake: `--config preset=paper budget=500`) keeps every
command and the DAG to so many hours: of GPUs, or on a CPU of jobs, one after the other. Until the rest fits, one thing
after another is left out:

1. what takes no core claim with it, the dearest first: an experiment that tests none, one of several models of an
   experiment, one of several experiments that test the same;
2. then whole experiments, the dearest per core claim lost first. The last one stays.

What would save less than a hundredth of what is left is not worth it, and stays for the time being. Conditions, grids
of learning rates and seeds are never thinned, so what remains can say all that it could before, and its runs are the
same runs. A larger budget keeps what a smaller one keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorabench import bill
from lorabench.config import Preset, PresetError
from lorabench.models.dimensions import dimensions
from lorabench.plan import Plan, make_plan

CORE_CLAIMS = {
    "rank": ("A1", "A3", "B1", "B2", "B3", "B4"),
    "batch_size": ("D1", "D2", "D3"),
    "placement": ("E1", "E2"),
    "early": ("C1",),
    "parametrization": ("C5",),
    "rl_arithmetic": ("F1", "F2"),
    "rl_gsm8k": ("F1", "F2"),
    "rl_math": ("F1", "F2"),
    "rl": ("F1", "F2"),
}
"""The claims that make up the paper's core, by the experiment that tests them."""

_OF_DENSE_MODELS = ("E1", "E2")

Unit = tuple[str, str]
"""An experiment on a model; what measures steps has no model of its own."""
_COMPUTE: Unit = ("compute", "")

# A share of the hours that are left: less is not worth leaving anything out.
_WORTH = 0.01


@dataclass(frozen=True)
class Step:
    """Something that is left out, and the hours that this saves when all before it is left out already."""

    units: frozenset[Unit]
    what: str
    hours: float


def with_budget(preset: str, hours: float | str) -> str:
    """The name of a preset within a budget, in place of any that it had.

    Raises:
        PresetError: the budget is no number of hours.
    """
    name, found = split_budget(f"{split_budget(preset)[0]}@{hours}")
    if found is None or not 0 < found < math.inf:
        raise PresetError(f"budget = {hours!r}: a number of hours above 0 is needed")
    return f"{name}@{found:g}"


def split_budget(preset: str) -> tuple[str, float | None]:
    """Name or path of a preset, and the hours behind the @ if there are any."""
    name, mark, hours = preset.rpartition("@")
    try:
        return (name, float(hours)) if mark else (preset, None)
    except ValueError:
        return preset, None


def within(preset: Preset, hours: float) -> tuple[Preset, list[str]]:
    """The preset without what is beyond the budget, and a sentence about each thing that was left out.

    The sentences are among the preset's limits too, for the report.

    Raises:
        PresetError: not even one experiment fits.
    """
    plan = make_plan(preset)
    unit = "GPU-hours" if preset.execution.gpu else "hours of jobs"
    total = _hours(bill.total(plan))
    left_out: set[Unit] = set()
    sentences: list[str] = []
    steps = order(plan)
    while total > hours:
        step = next(steps, None)
        if step is None:
            raise PresetError(
                f"a budget of {hours:g} {unit} is less than the {total:,.3g} of the last experiment that is left; "
                f"raise the budget or make the preset smaller"
            )
        left_out |= step.units
        sentences.append(f"Left out to stay within {hours:g} {unit}: {step.what}, which saves {step.hours:,.3g}.")
        preset = _without(preset, step.units)
        total = _hours(bill.total(make_plan(preset)))
    return preset.model_copy(update={"limits": [*preset.limits, *sentences]}), sentences


def order(plan: Plan) -> Iterator[Step]:
    """All that may be left out, in this order; the last experiment that trains may not."""
    needed = {job: {(name, job.sweeps[0].condition.model) for name in job.experiments} for job in plan.jobs}
    hours = {job: _hours(bill.training(plan, [job])) for job in plan.jobs}
    left: set[Unit] = set().union(*needed.values())
    if plan.preset.experiments.compute:
        left.add(_COMPUTE)

    def saved(more: frozenset[Unit]) -> float:
        kept = left - more
        jobs = sum(hours[job] for job, units in needed.items() if units & left and not units & kept)
        return jobs + (_hours(bill.compute(plan)) if _COMPUTE in more else 0.0)

    def lost(more: frozenset[Unit]) -> int:
        return len(_claims(plan.preset, left) - _claims(plan.preset, left - more))

    while True:
        whole = {name: frozenset(one for one in left if one[0] == name) for name, _ in left}
        choices = {units: name for name, units in whole.items() if left - units - {_COMPUTE}}
        choices |= {
            frozenset([one]): f"{one[0]} on {one[1]}"
            for one in left
            if len(whole[one[0]]) > 1 and one[0] in CORE_CLAIMS
        }
        everything = saved(frozenset(left))
        steps = [Step(units, what, saved(units)) for units, what in choices.items()]
        steps = [step for step in steps if step.hours >= _WORTH * everything]
        if not steps:
            return
        # Names make the order certain where hours are equal.
        free = [step for step in steps if not lost(step.units)]
        if free:
            best = max(free, key=lambda step: (step.hours, step.what))
        else:
            best = max(steps, key=lambda step: (step.hours / lost(step.units), step.what))
        left -= best.units
        yield best


def _claims(preset: Preset, units: Iterable[Unit]) -> set[str]:
    """The core claims that experiments test together."""
    return {
        claim
        for name, model in units
        for claim in CORE_CLAIMS.get(name, ())
        if claim not in _OF_DENSE_MODELS or not dimensions(preset.models[model]).experts
    }


def _hours(one: bill.Bill) -> float:
    return one.gpu_hours if one.gpus else one.job_hours


def _without(preset: Preset, units: frozenset[Unit]) -> Preset:
    """The preset without some experiments on some models."""
    experiments = preset.experiments
    changed: dict[str, object] = {}
    for name in {name for name, _ in units}:
        if name == "compute":
            changed[name] = None
            continue
        gone = {model for one, model in units if one == name}
        blocks = [
            block.model_copy(update={"models": kept})
            for block in experiments.trained()[name]
            if (kept := [model for model in block.models if model not in gone])
        ]
        changed[name] = blocks or None
    reduced = experiments.model_copy(update=changed)
    evaluation = preset.evaluation
    if evaluation is not None:
        chosen = [name for name in evaluation.experiments if name in reduced.trained()]
        evaluation = evaluation.model_copy(update={"experiments": chosen}) if chosen else None
    return preset.model_copy(update={"experiments": reduced, "evaluation": evaluation})
