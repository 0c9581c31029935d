"""What calibration covers: for each claim a scene, and whether the claim is true in it at each size of the effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """The name of the scene in SCENES that it is judged on."""
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


SCENES: dict[str, scenes.Scene] = {
    "ranks": scenes.ranks,
    "two datasets": scenes.two_datasets,
    "gaps": curve_scenes.gaps,
    "bends": curve_scenes.bends,
    "capacity": curve_scenes.capacity,
    "thresholds": curve_scenes.thresholds,
    "early": curve_scenes.early,
    "early growth": curve_scenes.early_growth,
    "equal FLOPs": curve_scenes.equal_flops,
    "lengths": scenes.lengths,
    "models": scenes.models,
    "law": scenes.law,
    "variants": scenes.variants,
    "beside LoRA": scenes.beside_lora,
    "wider": scenes.wider,
    "batch sizes": scenes.batch_sizes,
    "placements": scenes.placements,
    "MLP alone": scenes.mlp_alone,
    "experts": scenes.experts,
    "RL": rl.rl,
    "RL ranges": rl.rl_ranges,
    "RL placements": rl.rl_placements,
}
"""The scenes by name."""

_GAP = "the loss of the highest rank against that of FullFT"
_ATTENTION = "the loss of attention above that of the MLP"

COVERED = (
    Covered("A1", "gaps", "equality", "the curve of the highest rank against that of FullFT, late in training"),
    Covered("A2", "bends", "equality", "the bend of the curve of FullFT"),
    Covered("A3", "capacity", "difference", "the step at which rank 4 departs beyond that of rank 1", any_size=True),
    Covered("A4", "capacity", "equality", "the slope of rank 1 past its departure below the middle of the band"),
    Covered("A5", "thresholds", "equality", "the exponent of the departures by rank against 1"),
    Covered("A6", "two datasets", "difference", "the loss of the highest rank above that of FullFT on one dataset"),
    Covered("A7", "ranks", "equality", _GAP),
    Covered("A8", "capacity", "difference", "the loss of rank 1 above that of FullFT"),
    Covered("B1", "ranks", "equality", "the ratio of optimal LRs against 10"),
    Covered("B2", "ranks", "equality", _GAP),
    Covered("B3", "ranks", "equality", "the optimal LR of the highest rank against that of rank 4"),
    Covered("B4", "ranks", "difference", "the optimal LR of rank 1 below that of higher ranks"),
    Covered("B5", "models", "equality", "the LR ratio of one model against the mean of all"),
    Covered("B7", "law", "equality", "the regret of the law that is fitted to all models"),
    Covered("B8", "law", "equality", "the exponent of one family against the published one"),
    Covered("B9", "lengths", "difference", "the LR ratio after 50 and 100 steps above that at the end"),
    Covered("B10", "RL", "equality", "the ratio of optimal LRs against 10"),
    Covered("C1", "early", "equality", "the curve of a low rank against that of a high one, in the last window"),
    Covered("C2", "early growth", "difference", "the growth of the difference of two ranks"),
    Covered("C3", "early", "equality", "the loss of the low rank above that of the high one, in the first steps"),
    Covered("C9", "variants", "equality", "the loss of one variant below that of the standard parametrization"),
    Covered("C10", "ranks", "difference", "the share of layers of rank 1 in which B has the larger norm"),
    Covered("D1", "batch sizes", "difference", "the growth of the gap from the smallest batch size to the largest"),
    Covered(
        "D2", "batch sizes", "difference", "the fall of the gap of one rank along the run at the smallest batch size"
    ),
    Covered("D3", "batch sizes", "equality", "the growth with batch size of one rank's loss above another's"),
    Covered(
        "D4", "batch sizes", "difference", "the loss of FullFT at the largest batch size above that at the smallest"
    ),
    Covered("E1", "placements", "difference", _ATTENTION),
    Covered("E2", "MLP alone", "equality", "the loss of the MLP above that of all layers"),
    Covered("E3", "experts", "difference", _ATTENTION),
    Covered("E4", "placements", "difference", _ATTENTION),
    Covered("E5", "RL placements", "difference", "the error rate of attention above that of the MLP"),
    Covered("E7", "placements", "difference", _ATTENTION),
    Covered("F1", "RL", "equality", "the error rate of rank 1 above that of FullFT"),
    Covered("F2", "RL ranges", "difference", "the cost of a missed LR of FullFT above that of LoRA"),
    Covered("F3", "RL", "equality", "the training reward of one rank against that of FullFT"),
    Covered("F4", "RL", "equality", "the accuracy of rank 1 on a held-out set below that of FullFT"),
    Covered("F5", "RL", "equality", "the length of the responses of rank 1 over that of FullFT"),
    Covered("G2", "equal FLOPs", "difference", "the lead of LoRA at equal FLOPs, late in training"),
    Covered("X1", "beside LoRA", "equality", "the loss of DoRA below that of LoRA"),
    Covered("X2", "beside LoRA", "equality", "the optimal LR of rsLoRA against the predicted one"),
    Covered("X3", "beside LoRA", "equality", "the optimal LR of DoRA against that of LoRA"),
    Covered("X6", "wider", "equality", "the width of DoRA's range of good LRs over that of LoRA's"),
)
"""The claims that calibration covers, in the order of their ids."""
