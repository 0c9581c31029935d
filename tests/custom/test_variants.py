"""The best learning rates of variants over that of LoRA, as they are packaged and as the page has them."""

from __future__ import annotations

import csv
import math
import re

import pandas as pd
import pytest

from lorabench.config.fields import VARIANT_NAMES
from lorabench.config.loading import load_preset
from lorabench.custom.variants import TABLE, lr_factors
from lorabench.models.specs import dimensions
from lorabench.report.publish import PUBLISHED

from ..conftest import REPOSITORY

PUBLISHED_FIGURE = REPOSITORY / PUBLISHED / "variants/variants_of_lora.csv"
OWN = "variants"
"""The source of the rows that are of this project's runs."""


def test_a_range_around_one_counts_as_the_learning_rate_of_lora(tmp_path, monkeypatch):
    table = tmp_path / "table.csv"
    rows = ["dora,4,64,0.8", "dora,64,128,1.5", "pissa,4,64,0.1", "pissa,4,64,0.4", "pissa,4,64,0.3"]
    table.write_text("\n".join(["variant,rank,width,lr_ratio", *rows]))
    monkeypatch.setattr("lorabench.custom.variants.TABLE", table)
    dora, pissa = (lr_factors.__wrapped__()[variant] for variant in ("dora", "pissa"))
    assert (dora.value, dora.log_error) == (1.0, 0.0)
    assert str(dora) == "0.8 to 1.5 times LoRA's at ranks 4 to 64 and widths 64 to 128"
    assert (pissa.value, pissa.log_error) == (pytest.approx(0.2), pytest.approx(math.log(2)))
    assert str(pissa) == "0.1 to 0.4 times LoRA's at rank 4 and width 64"


def test_every_variant_has_a_factor_and_the_page_has_those_that_are_measured():
    factors = lr_factors()
    assert factors.keys() == VARIANT_NAMES.keys() - {"lora"}
    page = (REPOSITORY / "docs/variants.md").read_text(encoding="utf-8")
    for variant in ("pissa", "olora"):
        factor = factors[variant]
        row = rf"\| `{variant}` \| {factor.value:.2g}; .* measured {factor.low:.2g} to {factor.high:.2g};"
        assert re.search(row, page), row


def published_rows() -> list[dict[str, str]]:
    """Return the rows of the table that are of published runs whose ratio is resolved."""
    models = load_preset("variants").models
    figure = pd.read_csv(PUBLISHED_FIGURE)
    chosen = figure[(figure["element"] == "gap") & (figure["variant"] != "fullft") & figure["resolved"].eq(True)]
    return [
        {"variant": row["variant"], "rank": f"{row['rank']:.0f}", "width": str(dimensions(models[row["model"]]).hidden)}
        | {"dataset": row["dataset"], "lr_ratio": f"{row['lr_ratio']:.3g}", "source": OWN}
        for row in chosen.to_dict("records")
    ]


def table_rows() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_own_rows_are_those_of_the_published_figure():
    own = [row for row in table_rows() if row["source"] == OWN]
    assert own == published_rows(), "run: python -m tests.custom.test_variants, and correct docs/variants.md"


def write() -> None:
    """Write the table with the rows of the published runs in place of earlier ones."""
    rows = [*published_rows(), *(row for row in table_rows() if row["source"] != OWN)]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    write()
