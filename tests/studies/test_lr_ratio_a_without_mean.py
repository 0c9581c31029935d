"""What the committed runs of an A without the mean input say, as the page on the ratio states it."""

from __future__ import annotations

import pandas as pd

from studies.lr_ratio.scripts.a_without_mean import PAGE, PUBLISHED_RATIOS, page_part

from ..conftest import REPOSITORY


def test_the_table_of_the_page_is_that_of_the_published_preset():
    assert page_part(pd.read_csv(REPOSITORY / PUBLISHED_RATIOS)) in (REPOSITORY / PAGE).read_text(encoding="utf-8")
