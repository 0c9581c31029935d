"""The best learning rates of variants over that of LoRA, as they are packaged and as the page has them."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest
from lora_advice.variants import TABLE, VARIANT_NAMES, lr_factor

PAGE = Path(__file__).parents[2] / "studies/variants/README.md"


def test_a_range_around_one_counts_as_the_learning_rate_of_lora(tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    rows = ["dora,4,64,0.8", "dora,64,128,1.5", "pissa,4,64,0.1", "pissa,4,64,0.4", "pissa,64,64,0.3"]
    table.write_text("\n".join(["variant,rank,width,lr_ratio", *rows]))
    monkeypatch.setattr("lora_advice.variants.TABLE", table)
    lr_factor.cache_clear()
    dora, pissa = (lr_factor(variant, 4) for variant in ("dora", "pissa"))
    assert (dora.value, dora.log_error) == (1.0, 0.0)
    assert str(dora) == "0.80 to 1.50 times LoRA's at ranks 4 to 64 and widths 64 to 128"
    assert (pissa.value, pissa.log_error) == (pytest.approx(0.2), pytest.approx(math.log(2)))
    assert str(pissa) == "0.10 to 0.40 times LoRA's at ranks 4 to 64 and width 64"
    # What was measured at the nearest rank counts; ranks 4 and 64 are as far from 16.
    assert [lr_factor("pissa", rank).value for rank in (1, 16, 32, None)] == pytest.approx([0.2, 0.2, 0.3, 0.3])
    lr_factor.cache_clear()


def test_the_page_has_what_was_measured():
    page = PAGE.read_text(encoding="utf-8")
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"].startswith("variants")]
    assert {row["variant"] for row in rows} == VARIANT_NAMES.keys() - {"lora"}
    for variant in sorted({row["variant"] for row in rows}):
        ends = []
        for rank in ("4", "64"):
            ratios = [float(row["lr_ratio"]) for row in rows if (row["variant"], row["rank"]) == (variant, rank)]
            ends.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        assert re.search(rf"\| `{variant}` \| {ends[0]} \| {ends[1]} \|", page), (variant, ends)
