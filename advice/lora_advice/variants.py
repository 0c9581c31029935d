"""By how much the best learning rate (LR) moves when somebody switches from LoRA to a variant of it.

By the theory `movement` (studies/lr_ratio/README.md) rsLoRA is LoRA with alpha times the square root of the rank, and
LoRA+, for the LR of A, LoRA with alpha times the LR of B over that of A. For the others it was measured:
`variant_lrs.csv` has the best LR of a variant over that of LoRA, by rank, width of the model, and data. Its source is
`variants` for the published runs of that preset (`workflow/scripts/facts.py` writes these rows), or the name of a
source in studies/variants/README.md.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from lora_advice.errors import UserError
from lora_advice.theory import FACTS, SAME_LR

Variant = Literal["lora", "rslora", "lora_plus", "dora", "pissa", "olora", "qlora"]

VARIANT_NAMES: dict[Variant, str] = dict(
    zip(get_args(Variant), ("LoRA", "rsLoRA", "LoRA+", "DoRA", "PiSSA", "OLoRA", "QLoRA"), strict=True)
)
LORA_PLUS_RATIO = 16.0  # LR of B over LR of A in LoRA+, by its authors' recommendation
_LAWS: dict[Variant, str] = {
    "rslora": "rsLoRA counts as LoRA with alpha times the square root of the rank; ",
    "lora_plus": f"LoRA+ counts, for the LR of A, as LoRA with {LORA_PLUS_RATIO:g} times the alpha, and B has "
    f"{LORA_PLUS_RATIO:g} times that LR; ",
}
TABLE = FACTS / "variant_lrs.csv"


@dataclass(frozen=True)
class LrFactor:
    """The best LR of a variant over that of LoRA."""

    value: float  # the middle of what was measured at the nearest rank; 1 if all of it counts as the same LR
    low: float  # the ends of what was measured at any rank
    high: float
    where: str  # the ranks and widths of the measurements

    @property
    def log_error(self) -> float:
        """Half the measured range of the logarithm; 0 where the LR is LoRA's."""
        return 0.0 if self.value == 1 else math.log(self.high / self.low) / 2

    def __str__(self) -> str:
        ends = dict.fromkeys(f"{end:.2f}" if end >= 0.1 else f"{end:.2g}" for end in (self.low, self.high))
        return f"{' to '.join(ends)} times LoRA's {self.where}"


@cache
def lr_factor(variant: Variant, rank: float | None) -> LrFactor:
    """Return what was measured of the best LR of a variant of LoRA at the rank nearest to one; None counts as 32."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["variant"] == variant]
    ratios = [float(row["lr_ratio"]) for row in rows]
    ranks, widths = ([int(row[name]) for row in rows] for name in ("rank", "width"))
    low, high = min(ratios), max(ratios)
    same = max(high, 1 / low) <= SAME_LR
    # A configuration may state a rank that is no rank.
    wanted = rank if rank and rank > 0 else 32
    distances = [abs(math.log(measured / wanted)) for measured in ranks]
    near = [ratio for ratio, distance in zip(ratios, distances, strict=True) if math.isclose(distance, min(distances))]
    places = []
    for noun, values in (("rank", ranks), ("width", widths)):
        ends = [f"{end:,}" for end in sorted({min(values), max(values)})]
        places.append(f"{noun}{'s' if len(ends) > 1 else ''} {' to '.join(ends)}")
    return LrFactor(1.0 if same else math.sqrt(min(near) * max(near)), low, high, f"at {' and '.join(places)}")


def checked_variant(name: str) -> Variant:
    """Return the name of a variant, or raise UserError if it is not known."""
    if name not in VARIANT_NAMES:
        raise UserError(f"variant {name!r} is not known; allowed: {', '.join(VARIANT_NAMES)}")
    return name


def measured_factor(variant: Variant, rank: float | None) -> LrFactor:
    """Return what a variant's best LR is multiplied by; 1 for LoRA, and for those that are LoRA with another alpha."""
    return LrFactor(1, 1, 1, "") if variant in ("lora", *_LAWS) else lr_factor(variant, rank)


def lr_rule(variant: Variant) -> str:
    """Return in words by which rule the best LR of a variant follows from that of LoRA, and what was measured."""
    measured = f"the best LR of {VARIANT_NAMES[variant]} was measured as {lr_factor(variant, None)}"
    return f"{_LAWS.get(variant, '')}{measured} (studies/variants/README.md)"
