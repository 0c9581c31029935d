"""The best learning rates of variants over that of LoRA, as a table has them."""

import math

import pytest
from lora_advice.variants import lr_factor


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
