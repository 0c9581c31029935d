"""A recommendation as tables for a reader, and as a training script: finetune.py with its settings filled in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from lorabench.config.inputs import GgufModel
from lorabench.custom.data import UserData
from lorabench.custom.learning_rates import SourceShare
from lorabench.custom.recommend import Recommendation
from lorabench.data.files import REPEATED, TOO_LONG
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.specs import template_text
from lorabench.utils import formats
from lorabench.utils.formats import print_table

_TEMPLATE = Path(__file__).with_name("finetune.py")
_MAX_TOKENS = 4096


def recommendation_table(recommendation: Recommendation, data: UserData | None) -> None:
    """Print the settings with their sources, the optimal LRs of published and of your own runs, and the notes."""
    print(recommendation.model)
    if data is not None:
        print(data)
    settings = []
    for setting in recommendation.settings:
        value = setting.value if isinstance(setting.value, str) else f"{setting.value:,}"
        if setting.name.endswith("_lr"):
            value = f"{formats.lr(float(setting.value))} ({_interval(setting.low, setting.high, 2)})"
        settings.append((setting.what, value, setting.source))
    print_table(("setting", "value", "source"), settings)
    print_table(("LRs rest on", "widths", "LoRA", "weight", "FullFT", "weight"), _sources(recommendation))
    if recommendation.seen:
        rows = []
        for seen in recommendation.seen:
            arm = "FullFT" if seen.method == "fullft" else f"LoRA r{seen.rank}"
            rows.append((arm, formats.lr(seen.lr), _interval(seen.low, seen.high), seen.where))
        print_table(("optimal LR of", "LR", "95% interval", "source"), rows)
    for note in recommendation.notes:
        print(f"- {note}")


def _sources(recommendation: Recommendation) -> Iterable[tuple[str, ...]]:
    """Return a row for each source, the heaviest first, and one for the law alone."""

    def cells(share: SourceShare | None) -> tuple[str, str]:
        if share is None:
            return formats.DASH, formats.DASH
        lrs = formats.lr(share.low, 2) if share.low == share.high else _interval(share.low, share.high, 2)
        return lrs, f"{round(share.weight, 2) + 0.0:.0%}"

    by_method = {lr.method: {share.source: share for share in lr.sources} for lr in recommendation.lrs}
    shares = [share for lr in recommendation.lrs for share in lr.sources]
    widths = {share.source: share.widths for share in reversed(shares)}
    names = dict.fromkeys(share.source for share in shares)
    weights = {name: sum(share.weight for share in shares if share.source == name) for name in names}
    for name in sorted(names, key=lambda source: -weights[source]):
        yield (name, widths[name], *cells(by_method["lora"].get(name)), *cells(by_method["fullft"].get(name)))
    law = {lr.method: formats.lr(lr.law) for lr in recommendation.lrs}
    yield ("the law alone", "", law["lora"], "", law["fullft"], "")


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f"{formats.lr(low, digits)} to {formats.lr(high, digits)}"


def script(recommendation: Recommendation, data: UserData | None, chat_template: str | None) -> str:
    """Return a Python script that trains the model with transformers and PEFT.

    Args:
        recommendation: the model and its settings.
        data: the training data; None leaves a placeholder for their path.
        chat_template: a preset's setting for a model without its own template.

    Raises:
        UserError: the script does not support the model or the data.
    """
    model = recommendation.model
    if model.sizes.experts:
        raise UserError(f"{model.name} is a mixture of experts, which the script does not cover; use `lorabench init`")
    if isinstance(model.spec, GgufModel):
        raise UserError(
            f"{model.name} is a GGUF file; the script needs safetensors: `lorabench step convert` makes them"
        )
    settings: dict[str, object] = {
        "MODEL": model_location(model.spec),
        "CHAT_TEMPLATE": template_text(chat_template) if chat_template else None,
        "RANK": recommendation.rank,
        "LORA_LR": recommendation.setting("lora_lr").value,
        "FULL_LR": recommendation.setting("fullft_lr").value,
        "BATCH_SIZE": recommendation.batch_size,
        "MAX_TOKENS": min(_MAX_TOKENS, model.max_length or _MAX_TOKENS),
    }
    if data is not None:
        if data.source["kind"] != "file":
            raise UserError(f"data {data.name} is on the hub; the script reads a file")
        unsupported = {reason: rows for reason, rows in data.tally.bad.items() if reason not in (TOO_LONG, REPEATED)}
        if unsupported:
            reasons = replace(data.tally, bad=unsupported).reasons()
            raise UserError(f"{data.name} has rows that the script would not leave out: {reasons}; remove them")
        settings |= {"DATA": data.name, "FORMAT": data.source["format"]}
    text = _TEMPLATE.read_text(encoding="utf-8")
    for name, value in settings.items():
        # The comment after the value is kept.
        [line] = re.findall(rf"^{name} = .*$", text, re.MULTILINE)
        comment = "".join(line.partition("  # ")[1:])
        text = text.replace(f"{line}\n", f"{name} = {value!r}{comment}\n")
    return text
