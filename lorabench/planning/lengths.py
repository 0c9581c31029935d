"""Estimated lengths of examples, prompts and responses in tokens, without reading any data; imports no torch."""

from __future__ import annotations

from lorabench.config.datasets import DatasetSpec
from lorabench.config.models import ModelSpec
from lorabench.config.preset import Preset
from lorabench.runs import Condition

# Measured on the offline datasets: an example's mean length as a share of the limit, and its largest mean; characters
# per token of the tiny base's tokenizer and, roughly, of large ones. The lengths of the hub's problems are guesses.
_SHARE_OF_MAX_CHARS = {"instruct": 0.65, "worked": 0.83, "docstrings": 0.6}
_MEAN_CHARS = {"instruct": 216, "worked": 500, "docstrings": 472}
_CHARS_OF_A_FACT = 40
_CHARS_OF_A_PROBLEM = {
    "arithmetic": 90,
    "gsm_symbolic": 300,
    "sums": 8,
    "gsm8k": 300,
    "math": 300,
    "deepmath": 400,
    "file": 300,
}
_CHARS_PER_TOKEN = {"tiny": 2.0, "hub": 3.0, "path": 3.0, "gguf": 3.0}


def tokens_per_example(model: ModelSpec, dataset: DatasetSpec) -> float:
    """Return the estimated mean number of tokens of an example."""
    if dataset.kind in ("hub", "file"):
        return dataset.mean_tokens
    if dataset.kind == "facts":
        chars: float = _CHARS_OF_A_FACT
    else:
        chars = min(_SHARE_OF_MAX_CHARS[dataset.kind] * dataset.max_chars, _MEAN_CHARS[dataset.kind])
    return chars / _CHARS_PER_TOKEN[model.kind]


def prompt_tokens(preset: Preset, condition: Condition) -> float:
    """Return the estimated mean number of tokens of an RL condition's prompts."""
    kind = preset.problems[condition.dataset].kind
    return _CHARS_OF_A_PROBLEM[kind] / _CHARS_PER_TOKEN[preset.models[condition.model].kind]


def longest_sequence(preset: Preset, condition: Condition) -> int:
    """Return the estimated number of tokens of the longest example, or in RL of a prompt with the longest response."""
    model = preset.models[condition.model]
    if condition.rollouts is not None:
        return round(prompt_tokens(preset, condition)) + condition.rollouts.max_new_tokens
    dataset = preset.datasets[condition.dataset]
    if dataset.kind == "hub" and dataset.max_tokens is not None:
        return dataset.max_tokens
    chars = _CHARS_OF_A_FACT if dataset.kind == "facts" else dataset.max_chars
    return round(chars / _CHARS_PER_TOKEN[model.kind])
