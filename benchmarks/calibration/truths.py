"""What calibration covers: for each claim a scene, and whether the claim is true in it at each size of the effect."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.calibration import curve_scenes, rl, scenes

Truth = Literal["true", "false", "at the margin", "half true"]
"""Whether a claim is true in a world. At the margin of a claim of equality neither verdict is right. A claim of a
difference is half true if the difference is half of the margin."""

EFFECTS = (0.0, 0.5, 1.0, 2.0)
"""The sizes of effects that are tried, in margins."""

AGAINST = ("contradicted", "not seen here")
"""The verdicts against a claim: the second is that on models smaller than the claim's."""

SMALL = "right sign, below the margin"
"""The verdict on a difference that is there and matters too little."""

_WRONG: Mapping[Truth, tuple[tuple[str, ...], ...]] = {
    "true": (AGAINST,),
    "false": (("confirmed", SMALL),),
    "at the margin": (("confirmed",), AGAINST),
    "half true": (("confirmed",),),
}

_RIGHT: Mapping[Truth, tuple[str, ...]] = {
    "true": ("confirmed",),
    "false": AGAINST,
    "at the margin": (),
    "half true": (SMALL, *AGAINST),
}


@dataclass(frozen=True)
class Covered:
    """A claim that calibration covers."""

    claim_id: str
    scene: str
    """The name of the scene that it is judged on (see `scene_of`)."""
    kind: Literal["equality", "difference"]
    """Whether the claim says that there is no effect, or that there is one."""
    effect: str
    """What has the effect, as text."""
    any_size: bool = False
    """Whether a difference of any size confirms the claim, so that there is no margin."""

    def truth(self, effect: float) -> Truth:
        """Return whether the claim is true with an effect of so many margins."""
        if self.kind == "equality":
            return "true" if effect < 1 else "at the margin" if effect == 1 else "false"
        return "false" if effect == 0 else "half true" if effect < 1 and not self.any_size else "true"

    def wrong(self, effect: float) -> tuple[tuple[str, ...], ...]:
        """Return the sets of verdicts that are wrong with an effect of so many margins.

        All verdicts of a set together may fall in 5% of the worlds.
        """
        truth = self.truth(effect)
        # A difference that is there to the full is neither absent nor too small to matter.
        return ((*AGAINST, SMALL),) if self.kind == "difference" and truth == "true" else _WRONG[truth]

    def right(self, effect: float) -> tuple[str, ...]:
        """Return the verdicts that are right, none if only `inconclusive` is."""
        return _RIGHT[self.truth(effect)]


def scene_of(name: str) -> scenes.Scene:
    """Return the function of a scene by its name; that of "equal FLOPs" is `equal_flops`."""
    function = name.lower().replace(" ", "_")
    [scene] = [getattr(module, function) for module in (scenes, curve_scenes, rl) if hasattr(module, function)]
    return scene


COVERED = tuple(
    Covered(**row | {"any_size": row["any_size"] == "True"})
    for row in csv.DictReader(Path(__file__).with_name("covered.csv").read_text(encoding="utf-8").splitlines())
)
"""The claims that calibration covers, in the order of their ids."""
