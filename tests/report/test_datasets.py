"""The report's section on data that was left out, from files as the data jobs write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from lorabench.data.chat import SPLITS
from lorabench.data.files import tally_of
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import Limits, write_tokens
from lorabench.models.base import load_tokenizer
from lorabench.report.summary import dataset_origins
from lorabench.store.layout import Layout
from lorabench.utils.files import write_json

from ..hub.repositories import tulu3_row, write_tulu3


@pytest.fixture
def preset(raw_preset, tmp_path, monkeypatch):
    """Return a function that writes `mine.yaml` with other datasets into an empty folder, and returns its layout."""
    monkeypatch.chdir(tmp_path)

    def make(**changed: dict[str, Any]) -> Layout:
        raw = raw_preset | {"datasets": raw_preset["datasets"] | changed}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
        return Layout.of("mine.yaml")

    return make


def test_generated_data_has_no_row(preset):
    layout = preset()
    build_dataset(layout.preset.datasets["instruct"], layout.dataset("instruct"))
    assert dataset_origins(layout) == []


def test_bad_rows_of_a_file_are_shown_with_the_first(preset, tmp_path):
    lines = [json.dumps({"prompt": f"Say {n}", "completion": str(n)}) for n in range(12)]
    lines[3:3] = ["not JSON", '{"prompt": "no answer"}', "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    sizes = {"max_chars": 400, "mean_tokens": 10}
    layout = preset(rows={"kind": "file", "path": "rows.jsonl", "train": 8, "validation": 2, "test": 2, **sizes})
    write_json(tally_of(layout.preset.datasets["rows"]).plain(), layout.tally("rows"))
    assert dataset_origins(layout) == [
        {
            "name": "rows",
            "source": "file, prompt/completion",
            "rows": 15,
            "usable": 12,
            "left_out": ["2 not JSON (first: line 4)", "1 no text (first: line 5)"],
        }
    ]


def test_examples_too_long_for_a_limit_are_shown_by_split_and_model(preset):
    layout = preset()
    path, tokens = layout.dataset("instruct"), layout.tokens("tiny", "instruct")
    build_dataset(layout.preset.datasets["instruct"], path)
    tokenizer = load_tokenizer(layout.preset.models["tiny"])
    write_tokens(path, tokenizer, tokens, Limits(10_000))
    assert dataset_origins(layout) == []
    before = _lengths(tokens)
    limit = max(before) - 1
    write_tokens(path, tokenizer, tokens, Limits(10_000, limit))
    [row] = dataset_origins(layout)
    assert row["rows"] is None
    counts = [int(sentence.split()[0]) for sentence in row["left_out"]]
    assert sum(counts) == sum(length > limit for length in before)
    assert all(sentence.endswith("with more tokens than max_tokens for tiny") for sentence in row["left_out"])


def test_rows_of_the_hub_are_shown_with_their_reasons(preset, tmp_path):
    rows = [tulu3_row(number) for number in range(30)]
    # One row repeats a prompt, and another has an answer that is too long.
    rows += [tulu3_row(0), tulu3_row(40, answer="long " * 400)]
    write_tulu3(tmp_path / "copies", rows)
    sizes = {"train": 16, "validation": 4, "test": 4, "max_chars": 1500, "mean_tokens": 50}
    layout = preset(tulu={"kind": "hub", "id": "allenai/tulu-3-sft-mixture", "path": "copies", **sizes})
    build_dataset(layout.preset.datasets["tulu"], layout.dataset("tulu"))
    [row] = dataset_origins(layout)
    assert (row["rows"], row["usable"]) == (32, 30)
    assert row["left_out"] == ["1 of more than 1500 characters", "1 with the prompt of another"]


def _lengths(tokens: Path) -> list[int]:
    """Return the number of tokens of every example of a cache."""
    tensors = load_file(tokens)
    return [length for split in SPLITS for length in np.diff(tensors[f"{split}.offsets"]).tolist()]
