"""What was found, as answers to plain questions: each is read from the cells of one claim in the matrix.

A sentence names a verdict, the sizes of models at which it was reached, and what was measured there, so that it stays
true whatever the verdicts are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CORE
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.figures.evidence import ANSWERS, borderline
from lorabench.sources.measurements import TINY, holds_again
from lorabench.sources.source import SOURCE_FILE
from lorabench.utils import formats
from lorabench.utils.files import REFERENCE
from lorabench.utils.yaml_files import read_yaml


class Question(NamedTuple):
    """A question that a claim answers with yes."""

    claim_id: str
    text: str
    margin: str
    """The smallest effect that matters, with places for the default margins."""
    unit: str
    """The unit of the numbers; a cell with another unit is shown without its numbers."""
    measured: str
    """What was measured, with a place for its number."""
    form: str
    """The format of the number."""
    if_yes: str = ""
    """What to do where the largest models with a decision say yes."""
    if_no: str = ""
    if_open: str = ""
    """What to do where nothing is decided."""
    factor: float = 1.0
    """By what the numbers of the table are multiplied."""
    beside: str = ""
    """The claim whose answer this one stands beside, without saying what to do."""


_QUESTIONS = read_yaml(Path(__file__).with_name("questions.yaml"))
_EVERY = tuple(Question(claim_id, **about) for claim_id, about in _QUESTIONS.items())
QUESTIONS = tuple(question for question in _EVERY if not question.beside)


def answer(question: Question, cells: pd.DataFrame) -> str:
    """Return what to do and the answers, by the size of the model in ascending order, and those of questions beside it;
    `cells` is the table `matrix`."""
    own = cells[cells["claim_id"].eq(question.claim_id) & cells["verdict"].isin(list(ANSWERS))]
    rows = own.sort_values("parameters", kind="stable").to_dict("records")
    decided = [ANSWERS[row["verdict"]] for row in rows if row["verdict"] in DECIDED]
    advice = question.if_open if not decided else question.if_yes if decided[-1] == "yes" else question.if_no
    places: dict[str, list[str]] = {}
    for row in rows:
        where = f"{at_size(row['scale'])} ({remark})" if (remark := _remark(question, row)) else at_size(row["scale"])
        places.setdefault(ANSWERS[row["verdict"]], []).append(where)
    answers = [f"*{word.capitalize()}* {_listed(where)}." for word, where in places.items()]
    margin = question.margin.format(**DEFAULT_MARGINS.model_dump())
    asked = f"{question.text} (Margin: {margin}.)"
    return " ".join(
        [
            asked if question.beside else f"**{advice}** {asked}",
            *(answers or ["No runs in the paper's setting answer this."]),
            *(answer(other, cells) for other in _EVERY if other.beside == question.claim_id),
        ]
    )


def _remark(question: Question, cell: Mapping[Any, Any]) -> str:
    """Return what was measured in a cell, a range or a number with its 95% interval, and how sure the verdict is; where
    that is open, only the number and interval of the comparison that leaves it so, and who alone decides it."""

    def known(*names: str) -> list[str]:
        values = [question.factor * cell[name] for name in names if not formats.missing(cell[name])]
        return [format(value, question.form) for value in sorted(values)]

    estimate, ends, interval = known("estimate"), known("part_low", "part_high"), known("ci_low", "ci_high")
    measured, is_open = "", cell["verdict"] not in DECIDED
    if cell["unit"] == question.unit and estimate:
        if cell["n_parts"] > 1 and len(set(ends)) == 2 and not is_open:
            measured = question.measured.format(" to ".join(ends))
        else:
            measured = question.measured.format(estimate[0])
            measured += f" [{', '.join(interval)}]" if len(interval) == 2 else ""
    if is_open:
        # Estimates without their errors would look like an answer.
        so_far = f"so far {measured}" if len(interval) == 2 and measured else ""
        return "; ".join(filter(None, [so_far, _decided_alone(cell)]))
    again, same = "", holds_again(cell) and cell["explored"]
    if not formats.missing(cell["batches_alike"]):
        again = f"in {cell['batches_alike']:.0f} of {cell['batches']:.0f} batches of new seeds"
    elif holds_again(cell):
        again = "the same on held-out seeds" if same else "all seeds held out"
    elif not formats.missing(cell["held_out"]):
        again = f"{ANSWERS.get(cell['held_out'], 'not tested')} on held-out seeds"
    if borderline(cell):
        again = f"borderline, but {again}" if same else ", ".join(filter(None, ["borderline", again]))
    doubted = ""
    if not formats.missing(cell["source"]):
        precision = read_yaml(REFERENCE / str(cell["source"]) / SOURCE_FILE)["attributes"]["precision"]
        doubted = f"in runs of {cell['source']}, which has doubts of its own; precision: {precision}"
    return "; ".join(filter(None, [measured, again, doubted]))


def _decided_alone(cell: Mapping[Any, Any]) -> str:
    """Return the answers of presets and sources that decide alone what a cell leaves open."""
    found = re.findall(r"([^;:]+): ([^;]+)", "" if formats.missing(cell["others"]) else cell["others"])
    alone = {ANSWERS[verdict]: None for _, verdict in found if verdict in DECIDED}
    places = {
        word: dict.fromkeys(name.strip() for name, verdict in found if ANSWERS.get(verdict) == word) for word in alone
    }
    return "; ".join(f"{word} in {_listed(names)} alone" for word, names in places.items())


def count_of_core(cells: pd.DataFrame) -> str:
    """Return a sentence or two on how many of the core claims of the table `matrix` hold at each size."""
    core = cells[cells["claim_id"].isin(CORE)].sort_values("parameters", kind="stable")
    counted, above = [], []
    for scale, verdicts in core.groupby("scale", sort=False)["verdict"]:
        answers = verdicts.map(ANSWERS)
        yes, no, slight = ((answers == word).sum() for word in ("yes", "no", ANSWERS["right sign, below the margin"]))
        if not yes + no + slight:
            above.append(str(scale))
            continue
        above = []
        counts = [f"{yes} {'holds' if yes == 1 else 'hold'}"] if yes else []
        counts += [f"{slight} {'holds' if slight == 1 else 'hold'} by less than matters"] if slight else []
        counts += [f"{no} {'does' if no == 1 else 'do'} not"] if no else []
        counted.append(f"{_listed(counts)} {at_size(str(scale))}")
    rest = f", and **none is decided by all sources {at_size(above[0])} or above**" if above else ""
    said = f"Of the {len(CORE)} claims that carry the paper {'; '.join(counted)}."
    return f"{said} The others are undecided or not tested{rest}."


def at_size(scale: str) -> str:
    """Return where something was found, such as `at 8B`."""
    return "on tiny models" if scale == TINY else f"at {scale}"


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
