"""The filters with which the page's templates write values: formats of numbers, and texts that only the page needs."""

from __future__ import annotations

import re
from typing import Any

from lorabench.config.experiments import AutoLrs, Block
from lorabench.report import claim_text
from lorabench.store.io import list_of_words
from lorabench.utils import formats


def text(value: Any) -> str:
    """Write a value that is not a number; the members of a list are joined by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(text(part) for part in value) or formats.DASH
    return formats.DASH if formats.missing(value) or value == "" else str(value)


def in_paper(figure: Any) -> str:
    """Name the place in the paper that a claim's column `figure` holds: a figure's number, or a word."""
    place = text(figure)
    return f"fig. {place}" if place[0].isdigit() else place


def parametrization(block: Block) -> str:
    """Describe how the LoRA of a block of an experiment differs from the paper's parametrization."""
    parts = [f"alpha {_listed(block.alphas)}"] if block.alphas else []
    if block.alpha_power:
        parts.append(f"alpha times rank^{block.alpha_power:g}")
    if block.inits_a != [1.0]:
        parts.append(f"init of A times {_listed(block.inits_a)}")
    if block.lr_ratios != [1.0]:
        parts.append(f"LR of B / LR of A {_listed(block.lr_ratios)}")
    if block.transforms:
        parts.append("p, q " + " and ".join(_listed(pair) for pair in block.transforms))
    if block.eps is not None:
        parts.append(f"Adam's epsilon {block.eps:g}")
    return "; ".join(parts) or "standard"


def lrs(grid: list[float] | AutoLrs) -> str:
    """Describe a method's grid of LRs in a block of an experiment."""
    if isinstance(grid, AutoLrs):
        return f"found, at most {grid.most}"
    return ", ".join(map(formats.lr, grid)) or formats.DASH


def seeds(block: Block) -> str:
    """Say at which LRs of a block all seeds are trained."""
    if block.seeds.every > 1:
        return f"{block.seeds.every} at every LR"
    found = any(isinstance(grid, AutoLrs) for grid in (block.lrs.fullft, block.lrs.lora))
    return f"{block.seeds.best} at the {'three LRs around the best' if found else 'best LR'}"


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def anchor_run(run_id: Any) -> str:
    """Return the HTML id of a run's row, safe in a link."""
    return f"run-{_safe(run_id)}"


def anchor_claim(claim_id: Any) -> str:
    """Return the HTML id of a claim's card, safe in a link."""
    return f"claim-{_safe(claim_id)}"


def _safe(name: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", str(name))


FILTERS = {
    function.__name__: function
    for function in (
        *(formats.number, formats.signed, formats.nll, formats.lr, formats.interval, formats.lr_interval),
        *(formats.count, formats.amount, formats.parameters, formats.duration, formats.when),
        *(text, list_of_words, in_paper, parametrization, lrs, seeds, anchor_run, anchor_claim),
        *(claim_text.margin, claim_text.estimate, claim_text.power, claim_text.remark, claim_text.borderline),
    )
}
"""The functions that the templates use as filters, by name."""
