"""The type of a claim: a statement of the paper, a criterion, and the function that judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lorabench.analysis.comparison import Task
from lorabench.analysis.finding import Finding
from lorabench.claims.conditions import Condition
from lorabench.claims.evidence import Evidence

Kind = Literal["empirical", "derivation", "count", "opinion", "prediction", "own prediction"]
"""How the paper supports a statement.

- `empirical`: by runs of its own
- `derivation`: by a derivation, which runs can only illustrate
- `count`: by counting parameters, bits or operations, so that no run can speak against it
- `opinion`: by its authors' experience, without showing runs
- `prediction`: not at all, since the paper left the statement untested
- `own prediction`: not at all, since the statement is this project's and not the paper's
"""


@dataclass(frozen=True)
class Claim:
    """A testable statement of the paper."""

    id: str
    kind: Kind
    statement: str
    figure: str
    """The number of the paper's figure, or several with commas, or `text`; `own` if the paper has no such statement."""
    criterion: str
    """The conditions for the verdict `confirmed`, and for `contradicted`."""
    needs: str
    """The runs or tables that the criterion needs, for the reason of a claim that is not tested."""
    paper_value: str
    """The paper's number for the estimate, or its statement in words."""
    unit: str
    """The unit of the estimate."""
    experiments: tuple[str, ...]
    """The experiments whose runs the claim is judged on; in a table without the column `experiments`, all runs."""
    judge: Callable[[Evidence], Finding]
    columns: tuple[str, ...] = ()
    """The columns of `runs` that the claim needs beyond those of every claim on its task (see `NEEDED_BY`)."""
    task: Task = "sft"
    """The task whose runs the claim is judged on."""
    conditions: tuple[Condition, ...] = ()
    """What the runs must be like for the claim to be about them; without it the verdict is `setting not met`."""
    fact: str = ""
    """The fact that the claim states, in words; claims with the same fact are one in the headline."""
    core: bool = False
    """Whether the paper's main conclusions rest on this claim; the README shows the verdicts on these core claims."""


def untestable(reason: str) -> Callable[[Evidence], Finding]:
    """Return a judge for a claim that no preset tests; it gives the reason why."""
    return lambda evidence: Finding("not tested", reason)
