"""What `lorabench run --batches` and `lorabench decide` do: run batches of a preset one after the other, and judge them
together. Each batch is registered before its runs; what is there already is not run again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from lorabench.analysis.rules import DECIDED
from lorabench.claims.claim import Claim
from lorabench.claims.judge import CLAIMS
from lorabench.cli.common import plan_and_layout
from lorabench.cli.show import measured_speed
from lorabench.config.loading import split_name
from lorabench.errors import UserError
from lorabench.planning.costs import combined, job_cost
from lorabench.planning.plan import make_plan
from lorabench.report.batches import judge_registered
from lorabench.report.claim_text import measured
from lorabench.report.freeze import register, registered
from lorabench.store.layout import Layout
from lorabench.store.tables import Tables
from lorabench.utils import formats

Command = Callable[[str, list[str]], tuple[list[str], dict[str, str]]]
"""Returns the command line that runs a preset with options and targets of Snakemake, and its environment."""

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def seconds_of(budget: str) -> float:
    """Return the seconds of a time such as `90s`, `30m`, `1.5h` or `2d`; UserError if it is none."""
    parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", budget)
    if parts is None:
        raise UserError(f"--budget {budget!r}: allowed: a number with s, m, h or d after it, such as 30m")
    return float(parts[1]) * _UNITS[parts[2]]


def claims_named(ids: Sequence[str]) -> list[Claim]:
    """Return claims that are judged on runs, by their ids; UserError if there is no such claim."""
    by_id = {claim.id: claim for claim in CLAIMS if claim.experiments}
    if unknown := [name for name in ids if name not in by_id]:
        raise UserError(f"claim {unknown[0]!r}: allowed: {', '.join(by_id)}")
    return [by_id[name] for name in dict.fromkeys(ids)]


def run_batches(preset: str, n: int, command: Command, options: list[str]) -> None:
    """Run the first batches of a preset, and judge all claims on them together."""
    batches = _batches(preset, n)
    folders: list[Path] = []
    for batch in batches:
        _run(preset, batch, command, options, None)
        folders.append(Layout.of(batch).tables())
    out = Layout.of(preset).batches("all")
    judge_registered(preset, Tables.read(*folders), out)
    print(f"{len(batches)} batches judged together; the page is {out / 'index.html'}")


def decide(preset: str, ids: Sequence[str], budget: str, command: Command, options: list[str]) -> None:
    """Run what some claims need, batch after batch, until all of them are decided or the time is over."""
    claims, end = claims_named(ids), time.monotonic() + seconds_of(budget)
    _batches(preset, 1)
    planned, layout = plan_and_layout(preset)
    experiments = [
        name for name in planned.preset.experiments.trained() if any(name in claim.experiments for claim in claims)
    ]
    if lacking := [claim.id for claim in claims if not set(claim.experiments) & set(experiments)]:
        raise UserError(
            f"claim {lacking[0]!r}: the preset {layout.name} has none of the experiments that it is judged on"
        )
    _show_cost(preset, experiments, budget)
    out, folders = layout.batches("_".join(claim.id for claim in claims)), []
    for number in count(1):
        batch = _batches(preset, number)[-1]
        tables = [Layout.of(batch).tables(name) for name in experiments]
        if not _run(preset, batch, command, [*(str(folder / "runs.parquet") for folder in tables), *options], end):
            print(f"the budget of {budget} ended before batch {batch} was run; the same command goes on with it")
            return
        folders += tables
        judged, by_batch = judge_registered(preset, Tables.read(*folders), out, claims)
        still_open = judged["verdict"].eq("inconclusive")
        rows = []
        for claim in judged.to_dict("records"):
            latest = by_batch[by_batch["claim_id"] == claim["claim_id"]].to_dict("records")[-1]
            words = claim["reason"].partition(": ")[0]
            rows.append([claim["claim_id"], claim["verdict"], measured(claim | latest), words])
        print(f"after {batch}, {formats.duration(max(0.0, end - time.monotonic()))} of the budget left:")
        formats.print_table(("claim", "verdict", "all batches together", ""), rows)
        if not still_open.any():
            decided = judged["verdict"].isin(DECIDED).sum()
            print(f"{decided} of {len(judged)} claims are decided; the page is {out / 'index.html'}")
            return


def _batches(preset: str, n: int) -> list[str]:
    """Return the names of the first batches of a preset, which is named without a first seed."""
    if split_name(preset)[1] is not None:
        raise UserError(f"preset {preset!r}: batches have first seeds of their own; allowed: the name without @")
    return registered(preset, n)


def _show_cost(preset: str, experiments: Sequence[str], budget: str) -> None:
    """Print what a batch of these experiments costs, before it is paid."""
    planned, layout = plan_and_layout(preset)
    speed, _ = measured_speed(planned, layout) or ({}, None)
    if speed:
        planned = make_plan(planned.preset.with_execution(**speed))
    jobs = {job.job_id: job for name in experiments for job in planned.jobs_of(name)}
    cost = combined(job_cost(planned, job) for job in jobs.values())
    at_once = max(1, (os.cpu_count() or 1) // planned.preset.execution.threads)
    takes = f"{formats.number(cost.gpu_hours)} GPU-hours"
    if planned.preset.execution.gpu is None:
        takes = formats.duration(3_600 * cost.job_hours / min(at_once, len(jobs)))
    print(f"each batch of {', '.join(experiments)}: {cost.runs} runs, about {takes}; budget {budget}")


def _run(preset: str, batch: str, command: Command, options: list[str], end: float | None) -> bool:
    """Register a batch, and run it until a time if one is given; return whether it was finished.

    UserError says that Snakemake failed.
    """
    if (path := register(preset, batch)) is not None:
        print(f"{batch} is registered in {path}; commit it if its verdicts are to be published", flush=True)
    words, environment = command(batch, options)
    # A shell script starts what runs in the background with Ctrl-C's signal ignored, which its processes inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Its messages are no part of what this command prints.
    process = subprocess.Popen(words, env=environment, stdout=2)
    try:
        # A process that only begins would miss the signal.
        status = process.wait(None if end is None else max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        # Runs are at checkpoints when their jobs end, so that the same command continues them.
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if status:
        raise UserError(f"Snakemake failed at {batch} with status {status}; its messages are above")
    return True
