"""The output of `lorabench recommend` as tables."""

from __future__ import annotations

from collections.abc import Iterable

from lorabench.custom.data import UserData
from lorabench.custom.recommend import Recommendation, SeenOptimum, Setting
from lorabench.custom.recommended_lr import RecommendedLr, SourceShare
from lorabench.utils import formats
from lorabench.utils.console import print_table


def recommendation_table(recommendation: Recommendation, data: UserData | None) -> None:
    """Print the settings with their sources, the optimal LRs of published and of your own runs, and the notes."""
    print(recommendation.model)
    if data is not None:
        print(data)
    settings = ((setting.what, _value(setting), setting.source) for setting in recommendation.settings)
    print_table(("setting", "value", "source"), settings)
    print_table(("LRs rest on", "widths", "LoRA", "weight", "FullFT", "weight"), _sources(recommendation.lrs))
    if recommendation.seen:
        optima = (
            (_arm(seen), formats.lr(seen.lr), _interval(seen.low, seen.high), seen.where)
            for seen in recommendation.seen
        )
        print_table(("optimal LR of", "LR", "95% interval", "source"), optima)
    for note in recommendation.notes:
        print(f"- {note}")


def _value(setting: Setting) -> str:
    match setting.value:
        case str():
            return setting.value
        case number if setting.name.endswith("_lr"):
            return f"{formats.lr(number)} ({_interval(setting.low, setting.high, 2)})"
        case number:
            return f"{number:,}"


def _sources(lrs: tuple[RecommendedLr, ...]) -> Iterable[tuple[str, ...]]:
    """Return a row for each source, the heaviest first, and one for the law alone."""
    at = {lr.method: {share.source: share for share in lr.sources} for lr in lrs}
    names = {name: sum(of[name].weight for of in at.values() if name in of) for of in at.values() for name in of}
    for name in sorted(names, key=lambda source: -names[source]):
        cells = [_share(at[method].get(name)) for method in ("lora", "fullft")]
        widths = next(of[name].widths for of in at.values() if name in of)
        yield (name, widths, *(text for cell in cells for text in cell))
    law = {lr.method: formats.lr(lr.law) for lr in lrs}
    yield ("the law alone", "", law["lora"], "", law["fullft"], "")


def _share(share: SourceShare | None) -> tuple[str, str]:
    if share is None:
        return formats.DASH, formats.DASH
    lrs = formats.lr(share.low, 2) if share.low == share.high else _interval(share.low, share.high, 2)
    return lrs, f"{round(share.weight, 2) + 0.0:.0%}"


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"{formats.lr(low, digits)} to {formats.lr(high, digits)}"


def _arm(seen: SeenOptimum) -> str:
    return "FullFT" if seen.method == "fullft" else f"LoRA r{seen.rank}"
