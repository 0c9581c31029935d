"""The table of the frameworks' examples has what its verdicts rest on, and the page is of the table."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.lr import judge
from lora_advice.audit.regret import shipped_evidence
from lora_advice.models import facts

from advice.benchmarks.framework_defaults import PAGE, SAID, page_parts
from lorabench.store.published import PUBLISHED

from ..conftest import REPOSITORY

EVIDENCE = REPOSITORY / PUBLISHED / "evidence"


@pytest.mark.slow
def test_verdicts_follow_from_what_the_rows_say():
    runs = pd.read_csv(EVIDENCE / "framework_defaults.csv", keep_default_na=False, dtype=str)
    compared = 0
    for row in runs.to_dict("records"):
        said: dict[str, Any] = {name: row[name] for name in SAID if row[name]}
        whole = ("bits", "micro_batch", "accumulation", "devices", "global_batch", "group_size", "rank")
        said |= {name: int(float(said[name])) for name in whole if name in said}
        said |= {name: float(said[name]) for name in ("lr", "alpha", "steps", "epochs", "lr_ratio") if name in said}
        said |= {name: said[name] == "True" for name in ("rslora", "dora") if name in said}
        if row["factor"]:
            config = TrainingConfig(row["path"], row["format"], **said)
            judged = judge(config, facts(config.model), shipped_evidence())
            assert not isinstance(judged, str), row
            assert math.exp(judged[0].log_factor) == pytest.approx(float(row["factor"]), rel=2e-3), row
            compared += 1
    assert compared > 500


def test_the_page_is_of_the_tables():
    runs = pd.read_csv(EVIDENCE / "framework_defaults.csv").fillna({"errors": "", "warnings": ""})
    findings = pd.read_csv(EVIDENCE / "framework_findings.csv")
    assert "\n".join(page_parts(runs, findings)) in (REPOSITORY / PAGE).read_text(encoding="utf-8")
