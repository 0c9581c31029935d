"""The power of a preset's verdicts before it is run: made-up sweeps with the preset's own LRs, seeds and examples.

The seeds of a sweep that finds its LRs are chosen, and race, as in the preset.

A scene keeps what its claim is about: arms, lengths of runs and effects. Where the preset has no arm that plays a part
in a scene, the arm has as few seeds and learning rates (LRs) as any.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Literal

import pandas as pd

from benchmarks.calibration.made import ArmDesign, Design, Role, highest_rank, role
from benchmarks.calibration.run import Making, Task, counted_on, shares
from benchmarks.calibration.truths import COVERED, EFFECTS, Covered
from benchmarks.calibration.worlds import GRID_STEP
from lorabench.claims.judge import CLAIMS
from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Sweep

AT = (0.0, 2.0)
"""The sizes of effects, in margins, at which power is counted: where an equality is true, and where a difference is."""

COLUMNS = ["claim_id", "kind", "what", "test_examples", "n_worlds", "runs", "power_at_0", "power_at_2", "wrong"]
"""The columns of the table: the mean number of runs of a world, the share of worlds with the right verdict, and the
largest share with a wrong one at any size of the effect."""

RUNS_COUNTED = 20
"""The number of worlds of each size of the effect whose runs are counted."""

_AUTO_LRS = 5  # What a sweep that finds its grid is taken to have: its three first LRs and two further ones.


def design_of(plan: Plan, claim_id: str) -> Design | None:
    """Return how the sweeps that a claim is judged on are designed; None where the preset has none of them."""
    [claim] = [claim for claim in CLAIMS if claim.id == claim_id]
    sweeps = [
        sweep
        for sweep in plan.sweeps
        if sweep.condition.task == claim.task and set(sweep.experiments) & set(claim.experiments)
    ]
    sources = plan.preset.sources
    sweeps = [sweep for sweep in sweeps if sources[sweep.condition.dataset].kind != "facts"]
    if not sweeps:
        return None
    # One or two LRs are no sweep.
    swept = [sweep for sweep in sweeps if _of_sweep(sweep).n_lrs > 2] or sweeps
    by_role: dict[Role, list[ArmDesign]] = {}
    comparisons: dict[tuple[object, ...], list[Sweep]] = {}
    for sweep in sweeps:
        at = sweep.condition
        comparisons.setdefault((at.model, at.dataset, at.batch_size, at.steps), []).append(sweep)
    for members in comparisons.values():
        conditions = [vars(sweep.condition) for sweep in members]
        for sweep, condition in zip(members, conditions, strict=True):
            if sweep in swept:
                by_role.setdefault(role(condition, highest_rank(conditions)), []).append(_of_sweep(sweep))
    # The smallest sweep and set decide, as the worst of several comparisons does in a verdict.
    arms = {name: min(designs, key=lambda arm: (arm.seeds, arm.n_lrs)) for name, designs in by_role.items()}
    test, validation = (
        min(getattr(sources[sweep.condition.dataset], split) for sweep in swept) for split in ("test", "validation")
    )
    return Design(arms, test, validation)


def _of_sweep(sweep: Sweep) -> ArmDesign:
    best, every = sweep.seeds.best, max((number for _, number in sweep.seeds.given), default=1)
    if sweep.lattice is not None:
        return ArmDesign(
            max(_AUTO_LRS, len(sweep.lrs)), GRID_STEP, best, "around", sweep.seeds.around, sweep.seeds.racing
        )
    steps = [high / low for low, high in pairwise(sorted(sweep.lrs))]
    repeats: Literal["best", "every"] = "every" if every > best else "best"
    return ArmDesign(len(sweep.lrs), statistics.median(steps or [GRID_STEP]), max(best, every), repeats)


def power_of_plan(
    plan: Plan, worlds: int, claim_ids: Sequence[str] = (), processes: int = 1, making: Making | None = None
) -> pd.DataFrame:
    """Judge made-up worlds with the design of a plan's sweeps, and count the right verdicts.

    Args:
        worlds: the number of worlds for each claim and size of the effect.
        claim_ids: the claims; by default all that calibration covers and the preset has runs for.
        making: how the worlds are made, by default with the noise of `laptop`; its design is that of the plan.

    Returns:
        A row for each claim, with the columns COLUMNS.

    Raises:
        UserError: calibration does not cover a claim, or the preset has no runs for it.
    """
    making = making or Making()
    worlds += worlds % 2
    chosen: list[tuple[Covered, Design]] = []
    for covered in COVERED:
        design = design_of(plan, covered.claim_id)
        if design is not None and (not claim_ids or covered.claim_id in claim_ids):
            chosen.append((covered, design))
    if absent := sorted(set(claim_ids) - {covered.claim_id for covered, _ in chosen}):
        allowed = ", ".join(covered.claim_id for covered, _ in chosen)
        raise UserError(f"calibration does not cover {', '.join(absent)} in this preset; allowed: {allowed or 'none'}")
    scenes = [(covered.scene, [covered.claim_id], replace(making, design=design)) for covered, design in chosen]
    counts = counted_on(scenes, worlds, processes)
    counted = shares(counts).set_index(["claim_id", "effect"])
    rows = []
    for covered, design in chosen:
        sizes = [
            len(replace(making, design=design).tables(Task(covered.scene, effect, 0, 2), number).runs)
            for effect in EFFECTS
            for number in range(min(worlds, RUNS_COUNTED))
        ]
        power = [float(counted.loc[(covered.claim_id, effect), "power"]) for effect in AT]
        about = covered.claim_id, covered.kind, covered.effect, design.test_examples, worlds, fmean(sizes)
        rows.append([*about, *power, float(counted.loc[covered.claim_id, "wrong"].max())])
    return pd.DataFrame(rows, columns=COLUMNS)
