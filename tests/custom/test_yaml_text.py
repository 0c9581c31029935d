"""A preset's YAML has its comments above their keys, and PyYAML reads back what was written."""

from __future__ import annotations

import pytest
import yaml

from lorabench.custom.yaml_text import Inline, Noted, yaml_text

CONTENT = {
    "description": "LoRA: a test",
    "data": {"own": Noted("Two examples.", {"path": "own.jsonl"})},
    "blocks": [
        {
            "models": ["tiny"],
            "ranks": Noted("Low ranks.", Inline({"all": [1, 2]})),
            "lrs": {"lora": [1e-3, 2.2e-4]},
            "epochs": 0.125,
        }
    ],
}
TEXT = """\
# First line.
#   Second line.
description: "LoRA: a test"
data:
  # Two examples.
  own:
    path: own.jsonl
blocks:
  - models: [tiny]
    # Low ranks.
    ranks: {all: [1, 2]}
    lrs:
      lora: [1.0e-3, 2.2e-4]
    epochs: 0.125
"""


def test_comments_stand_above_their_keys():
    text = yaml_text("First line.\n  Second line.", CONTENT)
    assert text == TEXT
    assert yaml.safe_load(text)["blocks"][0]["lrs"] == {"lora": [1e-3, 2.2e-4]}


@pytest.mark.parametrize(
    "text", ["yes", "null", "2024", "1e-3", "1.5", "a: b", "# no", "", " x ", "\u2028\x85", "ü", "'\"\\"]
)
def test_any_text_is_read_back(text):
    assert yaml.safe_load(yaml_text("Odd texts.", {"key": {text: text}})) == {"key": {text: text}}


@pytest.mark.parametrize("number", [0.0, 1e-7, 0.015, 0.123456, 0.3, 1.0, 1e22, -2.5])
def test_any_number_is_read_back(number):
    [read] = yaml.safe_load(yaml_text("Numbers.", {"numbers": [number]}))["numbers"]
    assert isinstance(read, float)
    assert read == number
