"""What would decide inconclusive claims, from a finished preset's table `claims`, as further runs of its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from lorabench.analysis.arms import arm_label
from lorabench.errors import UserError
from lorabench.planning.further import More, further
from lorabench.planning.plan import Plan
from lorabench.runs import Sweep
from lorabench.store.io import read_rows, table_path
from lorabench.store.layout import Layout

_COLUMNS = (
    *("claim_id", "statement", "verdict", "would_decide"),
    *("decide_seeds", "decide_around", "decide_test_examples", "decide_lrs", "run_ids"),
)


@dataclass(frozen=True)
class Undecided:
    """An inconclusive claim, and what would decide it."""

    claim_id: str
    statement: str
    would_decide: str
    """In words; empty if the verdict names nothing."""
    seeds: int | None
    around: bool
    """Whether the seeds are needed at the three LRs around an optimum, and not only at the best LR."""
    test_examples: int | None
    lrs: tuple[tuple[str, float], ...]
    """LRs to add, each after the label of its arm with underscores for spaces."""
    run_ids: frozenset[str]
    """The runs behind the verdict."""

    @property
    def plannable(self) -> bool:
        """Whether further runs would decide it."""
        return bool(self.seeds or self.test_examples or self.lrs)


def undecided(layout: Layout, names: Sequence[str]) -> list[Undecided]:
    """Return inconclusive claims of a finished preset.

    Args:
        layout: the layout of the preset.
        names: ids of claims, or `all` for all inconclusive ones.

    Raises:
        UserError: the preset has no table of claims, or a named claim is not in it, has a verdict, or has no remedy
            that can be planned.
    """
    folder = layout.tables()
    if table_path(folder, "claims") is None:
        raise UserError(f"no table of claims in {folder}: what would decide a claim is known once the preset has run")
    rows = {row["claim_id"]: row for row in read_rows(folder, "claims", _COLUMNS)}
    if list(names) == ["all"]:
        return [_undecided(row) for row in rows.values() if row["verdict"] == "inconclusive"]
    chosen = []
    for name in dict.fromkeys(names):
        if name not in rows:
            raise UserError(f"claim {name!r} is not in the table of claims; allowed: all, {', '.join(rows)}")
        if rows[name]["verdict"] != "inconclusive":
            raise UserError(f"claim {name} is {rows[name]['verdict']}; only an inconclusive one can be decided")
        claim = _undecided(rows[name])
        if not claim.plannable:
            reason = f", which says: {claim.would_decide}" if claim.would_decide else ""
            raise UserError(f"claim {name}: no number of runs can be planned from its verdict{reason}")
        chosen.append(claim)
    return chosen


def _undecided(row: Mapping[str, object]) -> Undecided:
    def whole(name: str) -> int | None:
        value = row[name]
        return None if value is None else int(str(value))

    pairs = [str(pair).rpartition("=") for pair in _words(row["decide_lrs"])]
    return Undecided(
        str(row["claim_id"]),
        str(row["statement"]),
        str(row["would_decide"] or ""),
        whole("decide_seeds"),
        bool(row["decide_around"]),
        whole("decide_test_examples"),
        tuple((label, float(lr)) for label, _, lr in pairs),
        frozenset(_words(row["run_ids"])),
    )


def _words(value: object) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else []


def deciding(plan: Plan, claims: Sequence[Undecided]) -> Plan:
    """Return the plan of the further runs that would decide all of some claims together.

    The sweeps behind a claim get its number of seeds, and those of the named arms its LRs; the datasets of these sweeps
    get its number of test examples.

    Raises:
        UserError: no run of the plan is behind a claim, or a dataset's test split has no size that can be chosen.
    """
    more: dict[str, list[More]] = {}
    tests: dict[str, int] = {}
    for claim in claims:
        behind = [sweep for sweep in plan.sweeps if sweep.run_ids & claim.run_ids]
        if not behind:
            raise UserError(
                f"claim {claim.claim_id}: none of its runs is in the plan; has the preset changed since it was run?"
            )
        for sweep in behind:
            lrs = frozenset(lr for label, lr in claim.lrs if label == _label(sweep))
            seeds = claim.seeds or 1
            around = seeds if claim.around else 1
            more.setdefault(sweep.sweep_id, []).append(More(seeds, lrs, around))
            dataset = sweep.condition.dataset
            if claim.test_examples:
                tests[dataset] = max(tests.get(dataset, 0), claim.test_examples)
    return further(plan, {name: reduce(More.__or__, parts) for name, parts in more.items()}, tests)


def _label(sweep: Sweep) -> str:
    return arm_label(vars(sweep.condition)).replace(" ", "_")
