"""The learning rates to start from for a model, pooled from all optima that are known (see `analysis.pooled_lr`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorabench.analysis.lr_law import PUBLISHED as LAW
from lorabench.analysis.lr_law import lineage
from lorabench.analysis.pooled_lr import Place, PooledLr
from lorabench.sources.lr_optima import LrOptimum
from lorabench.sources.matrix import PROJECT

OWN = "your own presets"
"""The name of the optima that the user's finished presets measured, as one source."""

PROBABILITY = 0.8
"""The probability that the optimal LR of a further source lies in the recommended interval."""

# An attribute is outside of the evidence if the nearest value with evidence is further away than this factor.
_NEAR = 2.0
_NAMES = {"width": "width", "batch_size": "batch size", "steps": "length, in steps,"}


@dataclass(frozen=True)
class SourceShare:
    """A source that a recommended LR rests on."""

    source: str
    widths: str
    """The hidden sizes of its models, such as `64 to 256`."""
    low: float
    """The lowest of its optimal LRs, of LoRA at alpha 32."""
    high: float
    weight: float
    """By how much ln of the recommended LR rises if all ln LRs of the source rise by 1."""


@dataclass(frozen=True)
class RecommendedLr:
    """The LR of a method, with the interval of PROBABILITY for the optimum of a source that nobody has seen."""

    method: str
    lr: float
    low: float
    high: float
    law: float
    """The LR of the law alone; of a family without an exponent, in the middle of its families."""
    sources: tuple[SourceShare, ...]
    measured_by: str | None
    """The source that measured this very model, whose deviation is then part of the recommendation."""


def recommended_lr(
    optima: Sequence[LrOptimum], family: str, width: int, method: str, batch_size: float, steps: float, rl: bool = False
) -> RecommendedLr:
    """Recommend the LR of a method for a model.

    Args:
        optima: all that are known, of both methods and tasks; the user's own come last.
        family: the transformers model type.
        width: the hidden size.
        method: `lora` or `fullft`.
        batch_size: examples per step; in RL, responses per step.
        steps: NaN if they are not known.
        rl: whether the runs are of RL.
    """
    chosen = [optimum for optimum in optima if optimum.counts and (optimum.method, optimum.rl) == (method, rl)]
    pooled = PooledLr([optimum.pooled for optimum in chosen])
    place = Place.at(family, width, method, batch_size, steps)
    same = [
        (optimum.source, optimum.model)
        for optimum in chosen
        if optimum.width == width and lineage(optimum.family) == lineage(family)
        if optimum.source in (OWN, PROJECT)
    ]
    # Your own presets come last.
    measured = same[-1] if same else None
    predicted = pooled.predict(place, PROBABILITY, measured)
    shares = []
    for source, weight in predicted.weights.items():
        of_source = [optimum for optimum in chosen if optimum.source == source]
        lrs = [math.exp(optimum.pooled.log_lr) for optimum in of_source]
        widths = sorted({optimum.width for optimum in of_source if math.isfinite(optimum.width)})
        named = " to ".join(f"{width:.0f}" for width in dict.fromkeys((*widths[:1], *widths[-1:]))) or "not known"
        shares.append(SourceShare(source, named, _rounded(min(lrs)), _rounded(max(lrs)), round(weight, 3)))
    shares.sort(key=lambda share: -abs(share.weight))
    logs = (predicted.mean, predicted.low, predicted.high, place.log_law)
    lr, low, high, law = (_rounded(math.exp(log)) for log in logs)
    return RecommendedLr(method, lr, low, high, law, tuple(shares), measured[0] if measured else None)


def outside(optima: Sequence[LrOptimum], family: str, width: int, batch_size: float, steps: float) -> list[str]:
    """Say in a sentence each what no source of SFT has measured: the family, or a width, batch size or length."""
    chosen = [optimum for optimum in optima if optimum.counts and not optimum.rl]
    said = []
    if lineage(family) not in LAW.exponents:
        names = " and ".join(name.capitalize() for name in LAW.exponents)
        said.append(
            f"The law has no exponent for the family {family!r}: the learning rates rest on the middle of those of "
            f"{names}, and their intervals are wider for it."
        )
    for name, value in (("width", width), ("batch_size", batch_size), ("steps", steps)):
        known = sorted({getattr(optimum, name) for optimum in chosen if math.isfinite(getattr(optimum, name))})
        if math.isnan(value) or not known:
            continue
        nearest = min(known, key=lambda other: abs(math.log(other / value)))
        if max(nearest / value, value / nearest) > _NEAR:
            said.append(
                f"No source has measured a {_NAMES[name]} near {value:,.0f}; the nearest is {nearest:,.0f}, so the "
                "learning rates are an extrapolation and their intervals may be too narrow."
            )
    return said


def _rounded(lr: float) -> float:
    return float(f"{lr:.4g}")
