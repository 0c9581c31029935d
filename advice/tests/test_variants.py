"""The best learning rates of variants over that of LoRA, as they are packaged and as the page has them."""

from __future__ import annotations

import csv
import math
import re

import pandas as pd
import pytest

from lorabench.config.fields import VARIANT_NAMES
from lorabench.config.loading import load_preset
from lorabench.custom.variants import TABLE, _measured, lr_factor
from lorabench.models.specs import dimensions
from lorabench.report.publish import PUBLISHED

from ..conftest import REPOSITORY

FIGURES = {
    source: REPOSITORY / PUBLISHED / folder / "variants_of_lora.csv"
    for source, folder in (("variants", "variants"), ("variants@100", "variants/held_out"))
}


def test_a_range_around_one_counts_as_the_learning_rate_of_lora(tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    rows = ["dora,4,64,0.8", "dora,64,128,1.5", "pissa,4,64,0.1", "pissa,4,64,0.4", "pissa,64,64,0.3"]
    table.write_text("\n".join(["variant,rank,width,lr_ratio", *rows]))
    monkeypatch.setattr("lorabench.custom.variants.TABLE", table)
    _measured.cache_clear()
    dora, pissa = (lr_factor(variant, 4) for variant in ("dora", "pissa"))
    assert (dora.value, dora.log_error) == (1.0, 0.0)
    assert str(dora) == "0.80 to 1.50 times LoRA's at ranks 4 to 64 and widths 64 to 128"
    assert (pissa.value, pissa.log_error) == (pytest.approx(0.2), pytest.approx(math.log(2)))
    assert str(pissa) == "0.10 to 0.40 times LoRA's at ranks 4 to 64 and width 64"
    # What was measured at the nearest rank counts; ranks 4 and 64 are as far from 16.
    assert [lr_factor("pissa", rank).value for rank in (1, 16, 32, None)] == pytest.approx([0.2, 0.2, 0.3, 0.3])
    _measured.cache_clear()


def test_the_page_has_what_was_measured():
    page = (REPOSITORY / "studies/variants/README.md").read_text(encoding="utf-8")
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"].startswith("variants")]
    assert {row["variant"] for row in rows} == VARIANT_NAMES.keys() - {"lora"}
    for variant in sorted({row["variant"] for row in rows}):
        ends = []
        for rank in ("4", "64"):
            ratios = [float(row["lr_ratio"]) for row in rows if (row["variant"], row["rank"]) == (variant, rank)]
            ends.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        assert re.search(rf"\| `{variant}` \| {ends[0]} \| {ends[1]} \|", page), (variant, ends)


def published_rows() -> list[dict[str, str]]:
    """Return the rows of the table that are of published runs, on explored and on held-out seeds."""
    models, rows = load_preset("variants").models, []
    for source, path in FIGURES.items():
        figure = pd.read_csv(path)
        chosen = figure[(figure["element"] == "gap") & (figure["variant"] != "fullft") & figure["lr_ratio_low"].notna()]
        for row in chosen.to_dict("records"):
            width = str(dimensions(models[row["model"]]).hidden)
            measured = {"dataset": row["dataset"], "lr_ratio": f"{row['lr_ratio']:.3g}", "source": source}
            rows.append({"variant": row["variant"], "rank": f"{row['rank']:.0f}", "width": width} | measured)
    return rows


def test_the_table_has_the_published_learning_rates():
    """`python -m tests.custom.test_variants` writes it."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        assert [row for row in csv.DictReader(file) if row["source"] in FIGURES] == published_rows()


def write() -> None:
    """Write the table with the rows of the published runs."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        others = [row for row in csv.DictReader(file) if row["source"] not in FIGURES]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, others[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows([*published_rows(), *others])


if __name__ == "__main__":
    write()
