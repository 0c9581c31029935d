"""The output of `lorabench plan --decide`: what would decide inconclusive claims, and what that costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from lorabench.claims.decide import Undecided, deciding
from lorabench.errors import UserError
from lorabench.planning import bill
from lorabench.planning.plan import Plan
from lorabench.utils import formats

TOGETHER = "together"


@dataclass(frozen=True)
class Decision:
    """What would decide a claim, or several together."""

    claim: str
    """The claim's id, or TOGETHER."""
    text: str
    cost: bill.Bill | None
    """The cost of the further runs; None if none can be planned."""


def decisions(plan: Plan, claims: Sequence[Undecided], named: bool) -> list[Decision]:
    """Price what would decide each claim and, if runs can be planned for several, all of them together.

    Args:
        plan: the plan of the preset.
        claims: inconclusive claims.
        named: whether a user named these claims, so that further runs must be planned for each of them.

    Raises:
        UserError: `named`, and no further runs for a claim can be planned.
    """
    priced, plannable = [], []
    for claim in claims:
        text = claim.would_decide or "no number of seeds, examples or learning rates is known to decide it"
        try:
            cost = _cost(deciding(plan, [claim])) if claim.plannable else None
        except UserError as error:
            if named:
                raise
            cost, text = None, f"{text}; {error}"
        if cost is not None:
            plannable.append(claim)
            text += "" if cost.runs else "; the preset has these runs in its plan already"
        priced.append(Decision(claim.claim_id, text, cost))
    if len(plannable) > 1:
        priced.append(Decision(TOGETHER, "", _cost(deciding(plan, plannable))))
    return priced


def _cost(further: Plan) -> bill.Bill:
    return bill.training(further, further.jobs)


def decisions_table(
    plan: Plan, priced: Sequence[Decision], cores: int, price: float | None, notes: Sequence[str]
) -> None:
    """Print a table of claims: what would decide each, the number of further runs, and their time.

    Args:
        plan: the plan of the preset.
        priced: the claims, see `decisions`.
        cores: CPU cores that the jobs share.
        price: the price of one GPU for an hour, in any currency.
        notes: sentences to print below the table.
    """
    on_cpu = plan.preset.execution.gpu is None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("claim")
    table.add_column("would be decided by")
    for column in ("further runs", "minutes" if on_cpu else "GPU-hours", *(["money"] if price is not None else [])):
        table.add_column(column, justify="right")
    for decision in priced:
        cells = ["", ""]
        if (cost := decision.cost) is not None:
            time = bill.minutes(plan, cost, cores) if on_cpu else cost.gpu_hours
            cells = [str(cost.runs), formats.number(time, 2) if cost.runs else "0"]
            cells += [formats.count(cost.gpu_hours * price)] if price is not None else []
        if decision.claim == TOGETHER:
            table.add_section()
        table.add_row(decision.claim, decision.text, *cells)
    # Without a terminal, rich would assume a width of 80 characters and cut the columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table if priced else "no claim is inconclusive")
    for sentence in (_HOW, *notes) if priced else notes:
        console.print(sentence, highlight=False, soft_wrap=True)


_HOW = (
    "Seeds and learning rates (LRs) come to the runs that are there: raise them in the experiments' blocks. A larger "
    "test split makes new data, on which all runs are trained again."
)


def decisions_json(
    plan: Plan, priced: Sequence[Decision], cores: int, price: float | None, notes: Sequence[str]
) -> None:
    """Print the numbers of `decisions_table` as JSON, times in hours and sizes in bytes."""
    rows = []
    for decision in priced:
        cost = None if decision.cost is None else asdict(decision.cost)
        if cost is not None:
            cost["money"] = None if price is None else cost["gpu_hours"] * price
        rows.append({"claim": decision.claim, "would_decide": decision.text, "cost": cost})
    machine = {"gpu": plan.preset.execution.gpu, "cores": cores}
    print(json.dumps({**machine, "notes": list(notes), "decisions": rows}, indent=2))
