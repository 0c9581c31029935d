"""The table of the frameworks' examples has what its verdicts rest on, and the page is of the table."""

import pandas as pd
import pytest

from advice.benchmarks.framework_defaults import PAGE, judged_again, page_parts
from lorabench.store.published import PUBLISHED

from ..conftest import REPOSITORY

EVIDENCE = REPOSITORY / PUBLISHED / "evidence"


@pytest.mark.slow
def test_verdicts_follow_from_what_the_rows_say():
    runs = pd.read_csv(EVIDENCE / "framework_defaults.csv")
    again = judged_again(runs)
    assert runs["factor"].notna().sum() > 500
    for name in ("factor", "recommended", "low", "high", "share", "share_low", "share_high"):
        assert again[name].tolist() == pytest.approx(runs[name].tolist(), rel=2e-3, nan_ok=True), name


def test_the_page_is_of_the_tables():
    runs = pd.read_csv(EVIDENCE / "framework_defaults.csv").fillna({"errors": "", "warnings": ""})
    findings = pd.read_csv(EVIDENCE / "framework_findings.csv")
    assert "\n".join(page_parts(runs, findings)) in (REPOSITORY / PAGE).read_text(encoding="utf-8")
