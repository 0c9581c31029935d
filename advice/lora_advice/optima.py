"""The optimal learning rates (LRs) that are known, and the LR to start from that is pooled from them.

Those of published sources are the table `facts/lr_optima.csv`. Those of your own finished presets are the tables
`optima.csv` that the suite writes beside its verdicts; together they are one more source.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from hashlib import file_digest
from pathlib import Path
from typing import Any

from lora_advice.errors import UserError
from lora_advice.models import HUB_ID, ModelFacts, shipped_base, shipped_bases
from lora_advice.pooled_lr import ALPHA_EXPONENT, Optimum, Place, PooledLr
from lora_advice.theory import ALPHA, EXPONENTS, FACTS, lineage

OWN, PROJECT = "your own presets", "lorabench"
"""The names of the optima that the user's presets measured, and of those that this project did."""
PROBABILITY = 0.8  # the probability that the optimal LR of a further source lies in the recommended interval
NEAR = 2.0
"""An attribute is outside of the evidence if the nearest value with evidence is further away than this factor."""


@dataclass(frozen=True)
class LrOptimum:
    """One known optimal LR, with its place; NaN where the source does not say."""

    source: str = OWN
    model: str = ""
    family: str = ""
    method: str = ""
    width: float = math.nan
    batch_size: float = math.nan  # examples per step; in RL, responses per step
    steps: float = math.nan
    alpha: float = math.nan
    rl: bool = False
    lr: float = math.nan
    error: float = math.nan  # the standard error of ln LR; NaN where the optimum is at the edge of its grid
    counts: bool = False
    weights: str = ""  # of own runs: what identifies the model's weights

    @property
    def shift(self) -> float:
        """What to add to ln LR to state it at ALPHA."""
        known = self.method == "lora" and math.isfinite(self.alpha)
        return -ALPHA_EXPONENT * math.log(self.alpha / ALPHA) if known else 0.0

    @property
    def pooled(self) -> Optimum:
        """The optimum for pooling, at ALPHA."""
        unknown = self.method == "lora" and math.isnan(self.alpha)
        error = math.hypot(self.error, ALPHA_EXPONENT * math.log(2) if unknown else 0.0)
        place = Place.at(self.family, self.width, self.method, self.batch_size, self.steps)
        return Optimum(self.source, self.model, place, math.log(self.lr) + self.shift, error)


@dataclass(frozen=True)
class SourceShare:
    """A source that a recommended LR rests on."""

    source: str
    widths: str  # the hidden sizes of its models, such as `64 to 256`
    weight: float  # by how much ln of the recommended LR rises if all ln LRs of the source rise by 1


@dataclass(frozen=True)
class LrSources:
    """What a recommended LR rests on."""

    measured_by: str | None  # the source that measured this very model, whose deviation then counts
    sources: tuple[SourceShare, ...]  # the sources, the heaviest first


def read_optima(path: Path) -> list[LrOptimum]:
    """Read a table of optima, or raise UserError."""
    kinds = {field.name: str(field.type) for field in fields(LrOptimum)}
    readers: dict[str, Callable[[str], Any]] = {"float": float, "bool": "True".__eq__, "str": str}
    optima = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            try:
                optimum = LrOptimum(**{name: readers[kinds[name]](row[name]) for name in kinds if row.get(name)})
                if optimum.counts and not (optimum.lr > 0 and optimum.error > 0):
                    raise ValueError("an optimum that counts has an LR and an error above 0")
            except (TypeError, ValueError) as error:
                raise UserError(f"{path} is not a table of optima: {error}") from error
            optima.append(optimum)
    return optima


class KnownOptima:
    """The optima that are known for a model."""

    def __init__(self, model: ModelFacts, results: Path) -> None:
        """Read the published optima, and those of the finished presets in a folder of results, or raise UserError."""
        self.model, self.optima = model, read_optima(FACTS / "lr_optima.csv")
        identity, bases = _identity(model.name), shipped_bases().values()
        # The sources and names by which they have this very model, not one of its family and width alone.
        self._same = {(PROJECT, name) for base in bases if base["weights"] == identity for name in base["names"]}
        for path in sorted(results.glob("*/tables/optima.csv")):
            for optimum in read_optima(path):
                self.optima.append(optimum)
                if optimum.weights.startswith(identity or "unknown"):
                    self._same.add((OWN, optimum.model))
        self._pools: dict[tuple[str, bool], PooledLr] = {}

    def recommend(
        self, method: str, batch_size: float, steps: float, rl: bool = False
    ) -> tuple[tuple[float, float, float], LrSources]:
        """Recommend the LR of a method, `lora` at ALPHA or `fullft`: the LR, the ends of its interval, and its sources.

        The interval has the PROBABILITY of holding the optimum of a source that nobody has seen. The batch size is in
        examples per step, in RL in responses; steps that are not known are NaN.
        """
        chosen = [optimum for optimum in self.optima if optimum.counts and (optimum.method, optimum.rl) == (method, rl)]
        if (method, rl) not in self._pools:
            self._pools[method, rl] = PooledLr([optimum.pooled for optimum in chosen])
        place = Place.at(self.model.family, self.model.width, method, batch_size, steps)
        named = ((optimum.source, optimum.model) for optimum in reversed(chosen))
        measured = next((pair for pair in named if pair in self._same), None)
        predicted = self._pools[method, rl].predict(place, PROBABILITY, measured)
        shares = []
        for source, weight in sorted(predicted.weights.items(), key=lambda item: -abs(round(item[1], 3))):
            own = [optimum for optimum in chosen if optimum.source == source]
            widths = sorted({optimum.width for optimum in own if math.isfinite(optimum.width)})
            ends = " to ".join(f"{end:.0f}" for end in dict.fromkeys((*widths[:1], *widths[-1:])))
            shares.append(SourceShare(source, ends or "not known", round(weight, 3)))
        lr, low, high = (float(f"{math.exp(log):.4g}") for log in (predicted.mean, predicted.low, predicted.high))
        return (lr, low, high), LrSources(measured[0] if measured else None, tuple(shares))

    def outside(self, batch_size: float, steps: float) -> list[str]:
        """Return a sentence for each thing that no source of SFT has measured: family, width, batch size or length."""
        sentences = []
        if lineage(self.model.family) not in EXPONENTS:
            names = " and ".join(name.capitalize() for name in EXPONENTS)
            sentences.append(
                f"The law has no exponent for the family {self.model.family!r}: the learning rates rest on the middle "
                f"of those of {names}, and their intervals are wider for it."
            )
        for field, name, value in (
            ("width", "width", self.model.width),
            ("batch_size", "batch size", batch_size),
            ("steps", "length, in steps,", steps),
        ):
            measured = (getattr(optimum, field) for optimum in self.optima if optimum.counts and not optimum.rl)
            known = sorted(other for other in measured if math.isfinite(other / value))
            nearest = min(known, key=lambda other: abs(math.log(other / value)), default=value)
            if max(nearest / value, value / nearest) > NEAR:
                sentences.append(
                    f"No source has measured a {name} near {value:,.0f}; the nearest is {nearest:,.0f}, so the "
                    "learning rates are an extrapolation and their intervals may be too narrow."
                )
        return sentences


def _identity(name: str) -> str | None:
    """Return what runs record of a model's weights, as JSON; of one of the hub the beginning, without the commit."""
    if base := shipped_base(name):
        return str(base["weights"])
    if HUB_ID.fullmatch(name) and not Path(name).is_dir():
        return json.dumps({name: ""}).partition(": ")[0]
    digests = {}
    for path in sorted(Path(name).glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = file_digest(file, "sha256").hexdigest()
    return json.dumps(digests, sort_keys=True) if digests else None
