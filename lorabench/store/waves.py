"""The runs of a sweep on disk: its waves, as far as they are trained, and the table of a sweep that is finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import islice

import pyarrow as pa

from lorabench.errors import UserError
from lorabench.planning.plan import Plan
from lorabench.runs import Run, Sweep, best_lr, finished_losses, next_runs, validation_loss
from lorabench.store.collect import sweep_table
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder


def waves(sweep: Sweep, layout: Layout) -> Iterator[list[Run]]:
    """Yield the waves of a sweep's runs, each when the runs of the earlier ones are finished.

    UserError says that a run of the wave before is not finished, or that a finished run was made with another commit of
    a Hugging Face repository than is fetched now.
    """
    losses: dict[tuple[float, int], float] = {}
    while wave := next_runs(sweep, losses):
        fetched = layout.commits(sweep.condition)
        for folder in (RunFolder(layout.runs, run.run_id) for run in wave):
            used = folder.read_record()["environment"].get("hub_commits", {}) if folder.done() else fetched
            for name in (name for name in fetched if fetched[name] != used.get(name)):
                raise UserError(
                    f"run {folder.run_id} was made with {name} at commit {used.get(name)}, but {fetched[name]} is "
                    f"fetched now: write the former into the file of {name} in {layout.pins} and fetch again, or "
                    f"delete {folder.final} to train the run again"
                )
        yield wave
        losses |= {(run.lr, run.seed): _loss(run, layout) for run in wave}


def next_wave(plan: Plan, sweep: Sweep, layout: Layout, number: int) -> list[Run]:
    """Return the runs of the wave of a number, from 2, of a sweep whose runs are jobs of their own.

    It is empty after the last wave; but first it is the best run, which is deleted, if it must be trained again for its
    weights. UserError says that a run of an earlier wave is not finished.
    """
    known = list(islice(waves(sweep, layout), number))
    if len(known) == number:
        return known[-1]
    run = run_without_weights(plan, sweep, layout)
    if run is None:
        return []
    RunFolder(layout.runs, run.run_id).discard()
    return [run]


def run_without_weights(plan: Plan, sweep: Sweep, layout: Layout) -> Run | None:
    """Return the best run of a sweep, with the first seed, if it is finished and must be trained again for its weights.

    An earlier plan with other LRs may have had another best LR and deleted them. The weights of a restored run were
    left behind, and only an evaluation needs them.
    """
    best = best_lr(sweep, finished_losses(sweep, lambda run: _loss(run, layout)))
    if best is None:
        return None
    run = Run(sweep.condition, best, sweep.seeds.first)
    folder, evaluated = RunFolder(layout.runs, run.run_id), any(job.sweep == sweep for job in plan.evaluations())
    return run if not folder.weights.exists() and (evaluated or not folder.restored.exists()) else None


def end_sweep(plan: Plan, sweep: Sweep, layout: Layout, say: Callable[[str], None]) -> pa.Table:
    """Delete the weights of a finished sweep that the preset does not keep; return its runs as rows of JOB."""
    losses, folders = finished(sweep, layout)
    best = best_lr(sweep, losses)
    if sweep.lattice is not None:
        say(
            f"{sweep.condition.label} ended at {len({lr for lr, _ in losses})} LRs, "
            + ("all diverged" if best is None else f"the lowest loss at lr {best:.3g}")
        )
    if plan.preset.execution.keep_weights == "best":
        for folder in (folder for (lr, _), folder in zip(losses, folders, strict=True) if lr != best):
            shutil.rmtree(folder.weights, ignore_errors=True)
    return sweep_table(folders, sweep)


def finished(sweep: Sweep, layout: Layout) -> tuple[dict[tuple[float, int], float], list[RunFolder]]:
    """Return the losses of a finished sweep's runs by LR and seed, and their folders in this order.

    UserError says that a run is damaged or not finished.
    """
    losses = finished_losses(sweep, lambda run: _loss(run, layout))
    return losses, [RunFolder(layout.runs, Run(sweep.condition, lr, seed).run_id) for lr, seed in losses]


def _loss(run: Run, layout: Layout) -> float:
    folder = RunFolder(layout.runs, run.run_id)
    if not folder.done():
        raise UserError(
            f"run {run.run_id} is not finished, and which runs come after it depends on its loss; if it was deleted, "
            f"delete {layout.root}/waves too"
        )
    return validation_loss(folder.read_record())
