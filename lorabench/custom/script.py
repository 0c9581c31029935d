"""The training script of `lorabench recommend --script`: finetune.py with a recommendation's settings filled in."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from lorabench.config.models import GgufModel
from lorabench.custom.data import UserData
from lorabench.custom.recommend import Recommendation
from lorabench.data.rows import REPEATED, TOO_LONG
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.identity import template_text

_TEMPLATE = Path(__file__).with_name("finetune.py")
_MAX_TOKENS = 4096


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
