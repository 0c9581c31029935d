"""The report's tables: their numbers are those of the fits by which claims are judged, and they name data left out."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file

from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.rewards import with_error_rates
from lorabench.data.chat import SPLITS
from lorabench.data.files import file_chats
from lorabench.data.sft import build_dataset
from lorabench.data.tokens import write_tokens
from lorabench.models.base import load_tokenizer
from lorabench.report.summary import dataset_origins, example, experiment
from lorabench.store.layout import Layout
from lorabench.utils.files import write_json

from ..handmade import rl
from ..handmade.sft import arm, tables
from ..hub.repositories import copies, tulu3_row, write_tulu3


def described(arms):
    runs, curves = tables(arms)
    return experiment("rank", runs.assign(experiments=[["rank"]] * len(runs)), Judging())["arms"], runs, curves


def test_the_optimum_of_a_row_is_that_of_the_fit():
    rows, runs, curves = described([arm(optimum=3e-4), arm(8, optimum=3e-3, floor=2.1)])
    [comparison] = comparisons(runs, curves)
    for row, label in zip(rows, ("FullFT", "LoRA r8"), strict=True):
        minimum, optimum = comparison.fit.minima[label], comparison.fit.optima[label]
        assert row["lr"] == pytest.approx(math.exp(optimum.value))
        assert [row["best"], row["best_low"], row["best_high"]] == pytest.approx([minimum.value, *minimum.interval()])
        assert row["resolved"]
    assert row["ratio_resolved"]
    assert row["ratio"] == pytest.approx(math.exp(comparison.fit.log_ratio("LoRA r8", "FullFT").value))


def test_results_of_rl_are_accuracies():
    [_, row], runs, curves = described([rl.arm(None, optimum=1e-4), rl.arm(16, optimum=1e-3)])
    [comparison] = comparisons(with_error_rates(runs), curves)
    assert row["best"] == pytest.approx(1 - comparison.fit.minima["LoRA r16"].value)
    assert row["best_low"] < row["best"] < row["best_high"]


def test_the_example_of_a_dataset_is_its_first_question_with_the_answer(tmp_path):
    turns = {"system": "Be brief.", "user": "1+1", "assistant": "2"}
    chat = {"messages": [{"role": role, "content": content} for role, content in turns.items()]}
    for name, row in (("chats", chat), ("problems", {"question": "1+1", "answer": "2"})):
        pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / name)
        assert example(tmp_path / name) == ("1+1", "2")
    assert example(tmp_path / "absent") is None


@pytest.fixture
def preset(raw_preset, tmp_path, monkeypatch):
    """Return a function that writes `mine.yaml` with other datasets into an empty folder, and returns its layout."""
    monkeypatch.chdir(tmp_path)

    def make(**changed: dict[str, Any]) -> Layout:
        raw = raw_preset | {"datasets": raw_preset["datasets"] | changed}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw))
        return Layout.of("mine.yaml")

    return make


def test_bad_rows_of_files_and_of_the_hub_are_shown_with_their_reasons(preset, tmp_path):
    lines = [json.dumps({"prompt": f"Say {n}", "completion": str(n)}) for n in range(12)]
    lines[3:3] = ["not JSON", '{"prompt": "no answer"}', "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    # One row repeats a prompt, and another has an answer that is too long.
    rows = [tulu3_row(number) for number in range(30)] + [tulu3_row(0), tulu3_row(40, answer="long " * 400)]
    write_tulu3(tmp_path / "copies", rows)
    sizes = {"max_chars": 1500, "mean_tokens": 50}
    layout = preset(
        rows={"kind": "file", "path": "rows.jsonl", "train": 8, "validation": 2, "test": 2, **sizes},
        tulu={"kind": "hub", "id": "allenai/tulu-3-sft-mixture", "train": 16, "validation": 4,
              "test": 4, **sizes},
    )  # fmt: skip
    write_json(file_chats(layout.preset.datasets["rows"])[1].plain(), layout.tally("rows"))
    build_dataset(layout.preset.datasets["tulu"], layout.dataset("tulu"), copies(tmp_path / "copies"))
    file, hub = dataset_origins(layout)
    bad = ["2 not JSON (first: row 4)", "1 no text (first: row 5)"]
    assert file == {"name": "rows", "source": "file, prompt/completion", "rows": 15, "usable": 12, "left_out": bad}
    assert (hub["name"], hub["rows"], hub["usable"]) == ("tulu", 32, 30)
    assert hub["left_out"] == ["1 too long", "1 with the prompt of another"]


def test_generated_data_have_a_row_for_examples_too_long_only(preset):
    layout = preset()
    path, tokens = layout.dataset("instruct"), layout.tokens("tiny", "instruct")
    build_dataset(layout.preset.datasets["instruct"], path)
    tokenizer = load_tokenizer(layout.preset.models["tiny"])
    write_tokens(path, tokenizer, tokens, 10_000)
    assert dataset_origins(layout) == []
    ends = load_file(tokens)
    lengths = np.concatenate([np.diff(ends[f"{split}.offsets"]) for split in SPLITS])
    limit = int(lengths.max()) - 1
    write_tokens(path, tokenizer, tokens, 10_000, limit)
    [row] = dataset_origins(layout)
    counts = [int(sentence.split()[0]) for sentence in row["left_out"]]
    assert sum(counts) == (lengths > limit).sum()
