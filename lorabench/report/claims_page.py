"""The documentation's page of claims, made from their declarations.

`python -m lorabench.report.claims_page docs/claims.md` rewrites the part of the page between its two marker lines; the
text around it is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from lorabench.claims.catalog import CLAIMS
from lorabench.claims.claim import Claim, Condition
from lorabench.figures.short_names import FAMILIES
from lorabench.report.generated_block import text_around, write_around

START = "<!-- claims: written by `python -m lorabench.report.claims_page docs/claims.md`, never by hand -->"
END = "<!-- end of claims -->"


def claims_block(claims: Iterable[Claim] = CLAIMS) -> str:
    """Return the block between the marker lines, with them: a section per family, and in it one per claim."""
    ordered = sorted(claims, key=_position)
    stated: dict[str, list[str]] = {}
    for claim in ordered:
        stated.setdefault(claim.fact or claim.statement, []).append(claim.id)
    lines = [START, ""]
    for family, members in groupby(ordered, key=lambda claim: claim.id[0]):
        lines += [f"## {family}. {FAMILIES[family]}", ""]
        for claim in members:
            lines += [*_section(claim, stated[claim.fact or claim.statement]), ""]
    return "\n".join([*lines, END])


def write_page(page: Path) -> None:
    """Replace the block of a page.

    Raises:
        UserError: the page lacks one of the two marker lines.
    """
    write_around(page, text_around(page, START, END), claims_block())


def _position(claim: Claim) -> tuple[str, int]:
    """Return the sort key of a claim: its family, then its number."""
    return claim.id[0], int(claim.id[1:])


def _section(claim: Claim, stating: list[str]) -> list[str]:
    """Return the lines on a claim; `stating` are the ids of all claims that state its fact."""
    core = ", a core claim" if claim.core else ""
    entries = {
        "Kind": claim.kind + core,
        "Where": _where(claim.figure),
        "Value in the paper": claim.paper_value,
        "Unit of the estimate": claim.unit,
        "Criterion": claim.criterion,
        "Needs": claim.needs,
    }
    texts = {name: _escaped(text) for name, text in entries.items()}
    if others := [f"[{claim_id}](#{claim_id.lower()})" for claim_id in stating if claim_id != claim.id]:
        texts = {"Fact": f"{_escaped(claim.fact)} (also {_listed(others)})"} | texts
    if claim.conditions:
        texts["Conditions"] = "; ".join(_condition(condition) for condition in claim.conditions)
    texts["Runs"] = _runs(claim)
    heading = f"### {claim.id} {_escaped(claim.statement)} {{ #{claim.id.lower()} }}"
    return [heading, "", *(f"- **{name}**: {text}" for name, text in texts.items())]


def _condition(condition: Condition) -> str:
    """Return a condition in words, with the shipped presets that meet it."""
    names = [f"`{name}`" for name in condition.presets]
    presets = f"preset{'s' if len(names) > 1 else ''} {_listed(names)}" if names else "no shipped preset"
    return f"{_escaped(condition.text)} ({presets})"


def _where(figure: str) -> str:
    """Return the place in the paper: `1, 2` becomes `figures 1 and 2`, `4 (table)` becomes `table of figure 4`."""
    if figure == "text":
        return "text"
    if figure == "own":
        return "not in the paper"
    if figure.endswith(" (table)"):
        return f"table of figure {figure.removesuffix(' (table)')}"
    if not figure[0].isdigit():
        return f"figure of {figure}"
    numbers = figure.split(", ")
    return f"figures {' and '.join(numbers)}" if len(numbers) > 1 else f"figure {figure}"


def _runs(claim: Claim) -> str:
    """Return the experiments whose runs the claim is judged on."""
    if not claim.experiments:
        return "none"
    names = [f"`{name}`" for name in claim.experiments]
    return f"{'experiments' if len(names) > 1 else 'experiment'} {_listed(names)}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _escaped(text: str) -> str:
    """Return plain text as Markdown that shows the same characters."""
    return re.sub(r"([*_<`])", r"\\\1", text)


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
