"""Reducing a preset to a budget of hours, by leaving out parts of it in a fixed order.

`NAME@HOURS` in place of a preset's name (`paper@500`; in Snakemake `--config preset=paper budget=500`) limits every
command and the DAG to a number of GPU-hours, or on a CPU to hours of jobs, one after the other. Parts are left out one
by one until the remaining plan fits:

1. first the parts without which every core claim can still be tested, the most expensive first: an experiment that
   tests none, one of several models of an experiment, one of several experiments that test the same claims;
2. then whole experiments, the one with the most hours per lost core claim first. The last experiment is kept.

A part that would save less than a hundredth of the remaining hours is kept until larger parts are gone. Conditions,
grids of learning rates and seeds are never thinned, so the remaining experiments can show all that they could before,
and their runs are the same runs. A larger budget keeps everything that a smaller one keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lorabench.config.fields import PresetError
from lorabench.config.preset import Preset
from lorabench.models.dimensions import dimensions
from lorabench.planning import bill
from lorabench.planning.plan import Plan, make_plan

CORE_CLAIMS_BY_EXPERIMENT = {
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

# Claims that only dense models can test.
_DENSE_MODELS_ONLY = ("E1", "E2")

Unit = tuple[str, str]
"""A part that can be left out: an experiment's name and a model's, which is empty for the experiment `compute`."""
_COMPUTE: Unit = ("compute", "")

# The share of the remaining hours that a part must at least save to be left out.
_WORTH = 0.01


@dataclass(frozen=True)
class Step:
    """A part that is left out, and the hours that this saves once all earlier steps are taken."""

    units: frozenset[Unit]
    what: str
    hours: float


def with_budget(preset: str, hours: float | str) -> str:
    """Return the name of a preset with a budget, which replaces any budget in that name.

    Raises:
        PresetError: the budget is no number of hours.
    """
    name, budget = split_budget(f"{split_budget(preset)[0]}@{hours}")
    if budget is None or not 0 < budget < math.inf:
        raise PresetError(f"budget = {hours!r}: a number of hours above 0 is needed")
    return f"{name}@{budget:g}"


def split_budget(preset: str) -> tuple[str, float | None]:
    """Split `NAME@HOURS` into a preset's name or path and its budget in hours, None if there is none."""
    name, mark, hours = preset.rpartition("@")
    try:
        return (name, float(hours)) if mark else (preset, None)
    except ValueError:
        return preset, None


def reduce_to_budget(preset: Preset, hours: float) -> tuple[Preset, list[str]]:
    """Leave out parts of a preset until it fits a budget of hours.

    Returns:
        The reduced preset, and a sentence about each part that was left out. The sentences are also among the reduced
        preset's limits, for the report.

    Raises:
        PresetError: not even one experiment fits.
    """
    plan = make_plan(preset)
    unit = "GPU-hours" if preset.execution.gpu else "hours of jobs"
    total = _hours(bill.total(plan))
    left_out: set[Unit] = set()
    sentences: list[str] = []
    steps = steps_in_order(plan)
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


def steps_in_order(plan: Plan) -> Iterator[Step]:
    """Yield the parts to leave out, in order, until only one experiment that trains remains.

    The module's docstring describes the order.
    """
    needed = {job: {(name, job.sweeps[0].condition.model) for name in job.experiments} for job in plan.jobs}
    hours = {job: _hours(bill.training(plan, [job])) for job in plan.jobs}
    left: set[Unit] = set().union(*needed.values())
    if plan.preset.experiments.compute:
        left.add(_COMPUTE)

    def saved(units_out: frozenset[Unit]) -> float:
        kept = left - units_out
        jobs = sum(hours[job] for job, units in needed.items() if units & left and not units & kept)
        return jobs + (_hours(bill.compute(plan)) if _COMPUTE in units_out else 0.0)

    def lost(units_out: frozenset[Unit]) -> int:
        return len(_claims(plan.preset, left) - _claims(plan.preset, left - units_out))

    while True:
        whole = {name: frozenset(unit for unit in left if unit[0] == name) for name, _ in left}
        choices = {units: name for name, units in whole.items() if left - units - {_COMPUTE}}
        choices |= {
            frozenset([(name, model)]): f"{name} on {model}"
            for name, model in left
            if len(whole[name]) > 1 and name in CORE_CLAIMS_BY_EXPERIMENT
        }
        everything = saved(frozenset(left))
        steps = [Step(units, what, saved(units)) for units, what in choices.items()]
        steps = [step for step in steps if step.hours >= _WORTH * everything]
        if not steps:
            return
        # Names decide where hours are equal, so that the order is always the same.
        free = [step for step in steps if not lost(step.units)]
        if free:
            best = max(free, key=lambda step: (step.hours, step.what))
        else:
            best = max(steps, key=lambda step: (step.hours / lost(step.units), step.what))
        left -= best.units
        yield best


def _claims(preset: Preset, units: Iterable[Unit]) -> set[str]:
    """Return the core claims that experiments on models test together."""
    return {
        claim
        for name, model in units
        for claim in CORE_CLAIMS_BY_EXPERIMENT.get(name, ())
        if claim not in _DENSE_MODELS_ONLY or not dimensions(preset.models[model]).experts
    }


def _hours(cost: bill.Bill) -> float:
    return cost.gpu_hours if cost.gpus else cost.job_hours


def _without(preset: Preset, units: frozenset[Unit]) -> Preset:
    """Return the preset without some experiments on some models."""
    experiments = preset.experiments
    changed: dict[str, object] = {}
    for name in {name for name, _ in units}:
        if name == "compute":
            changed[name] = None
            continue
        gone = {model for experiment, model in units if experiment == name}
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
